# PSPNet (Zhao et al. 2017), narrow.
_base_ = ["mini_base.py"]
model = dict(
    decode_head=dict(
        type="PSPHead",
        in_channels=[16, 128],
        in_index=[0, 3],
        input_transform="resize_concat",
        channels=32,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=None,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
)
