# What the two mini segmenters share: a ResNet-18 of 16 to 128 channels. The heads see its first stage (stride 4,
# where the strokes are) beside its last one (stride 16, where the digits are), resized to stride 4 and concatenated.
crop_size = (96, 96)
norm_cfg = dict(type="BN", requires_grad=True)
data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[127.5, 127.5, 127.5],
    std=[63.75, 63.75, 63.75],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    size=crop_size,
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
default_scope = "mmseg"
custom_imports = dict(imports=["tasks.mini.streams"], allow_failed_imports=False)
