# mini_pspnet's network, trained on from its weights with adversarial halves of batches (recipe in
# tasks/mini/zoo_adversarial.py): fewer and smaller steps, scenes at their final contrast.
_base_ = ["mini_pspnet.py"]
iters = 900
train_dataloader = dict(dataset=dict(length=iters * 16, easy_share=0.0))
train_cfg = dict(max_iters=iters)
optim_wrapper = dict(optimizer=dict(lr=2e-3), paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0))))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=iters // 10),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=iters // 10, end=iters),
]
