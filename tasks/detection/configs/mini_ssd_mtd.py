# mini_ssd's network, trained on from its weights with adversarial halves of batches (recipe in
# tasks/mini/zoo_adversarial.py): scenes at their final contrast.
_base_ = ["mini_ssd.py"]
iters = 1200
train_dataloader = dict(dataset=dict(length=iters * 16, easy_share=0.0))
train_cfg = dict(max_iters=iters)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=iters // 10),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=iters // 10, end=iters, eta_min=1e-5),
]
