# SegNet-Basic (Badrinarayanan et al. 2017) on CamVid with 11 classes, for `model: {name: mmseg, config:
# segnet_basic_camvid, checkpoint: ...}`, and its training with mmseg: SGD with a fixed rate of 0.1 and momentum 0.9,
# batches of 12, classes balanced by median frequency (section 4.2). Weight decay, number of iterations and the weights of
# the classes are those of the authors' Caffe model.
default_scope = "mmseg"
custom_imports = dict(imports=["tasks.segmentation._segnet"], allow_failed_imports=False)
void = 11
model = dict(
    type="EncoderDecoder",
    # The network normalises by itself; images stay 0..255 in BGR.
    data_preprocessor=dict(type="SegDataPreProcessor", pad_val=0, seg_pad_val=void, size=(360, 480)),
    backbone=dict(type="SegNetBasic"),
    decode_head=dict(
        type="FCNHead",
        num_convs=0,
        concat_input=False,
        in_channels=64,
        channels=64,
        in_index=0,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=None,
        align_corners=False,
        ignore_index=void,
        loss_decode=dict(
            type="BalancedCrossEntropy",
            class_weight=[
                0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614,
            ],
        ),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(480, 360), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=12,
    num_workers=2,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="BaseSegDataset",
        data_root="data/CamVid",
        img_suffix=".png",
        data_prefix=dict(img_path="train", seg_map_path="trainannot"),
        pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
    ),
)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=10000, val_interval=10**9)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4))
default_hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1000))
