# What the two mini segmenters share: a ResNet-18 of 16 to 128 channels, and training on scenes blended on the fly.
# The heads see its first stage (stride 4, where the strokes are) beside its last one (stride 16, where the digits
# are), resized to stride 4 and concatenated. The heads have no batch normalisation: with it, the digits' classes,
# a tenth of the pixels, are learned several times more slowly here.
default_scope = "mmseg"
norm_cfg = dict(type="BN", requires_grad=True)
data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[127.5, 127.5, 127.5],
    std=[63.75, 63.75, 63.75],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    size=(96, 96),
    test_cfg=dict(size_divisor=16),
)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=data_preprocessor,
    pretrained=None,
    backbone=dict(
        type="ResNetV1c",
        depth=18,
        num_stages=4,
        base_channels=16,
        stem_channels=16,
        out_indices=(0, 1, 2, 3),
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 1),
        norm_cfg=norm_cfg,
        norm_eval=False,
        style="pytorch",
        contract_dilation=False,
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

iters = 1600
batch_size = 16
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="pseudo_collate"),
    dataset=dict(type="MiniSceneStream", split="train", length=iters * batch_size, seed=0, size=96, easy_share=0.5),
)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iters, val_interval=10**9)
# The backbone comes from digit classification and needs smaller steps than the new head.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=4e-3, weight_decay=0.02),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.25))),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=iters // 10),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=iters // 10, end=iters),
]
default_hooks = dict(checkpoint=None)
log_level = "WARNING"
