"""Networks of CLADA: translator, its discriminator and projection heads; task model and feature discriminator.

Self-contained: depends on torch, and for `UNet` on efficientnet-pytorch. G, D and H are those of the paper's equations.

    generator = ResnetGenerator()                            # stage 1: G; PatchDiscriminator is D, PatchProjector H
    image, features = generator(x, return_features=True)     # x: (B, 3, H, W) in [-1, 1]
    logits = UNet(encoder="efficientnet-b3")(photo)          # stages 3 and 4: the task model; photo: (B, 3, H, W) in [0, 1]
    generator = load_network("RUN")                          # the network of a finished run
"""

import os
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn


class InstanceNorm2d(nn.InstanceNorm2d):
    """Instance norm without affine parameters. At batch size 1 it runs batch norm: same values, keeps channels_last.

    Trace or export it with a batch of two or more, unless it will only ever see one image at a time.
    """

    def forward(self, x):
        if x.shape[0] == 1:
            return F.batch_norm(x, None, None, training=True, eps=self.eps)
        return super().forward(x)


def norm_relu(channels):
    return nn.Sequential(InstanceNorm2d(channels), nn.ReLU(inplace=True))


class ReflectPad2d(torch.autograd.Function):
    """Reflection padding, (B, C, H, W) -> (B, C, H + 2n, W + 2n) in channels_last: same values as F.pad.

    CUDA's own kernel returns the default format, which costs two copies, and its backward is not deterministic (atomics).
    """

    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        B, C, H, W = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(-1, C).index_select(0, reflected_indices(B, H, W, n, x.device))
        return pixels.view(B, H + 2 * n, W + 2 * n, C).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient):
        n = ctx.n
        for dim in (2, 3):
            size = gradient.shape[dim] - 2 * n
            inner = gradient.narrow(dim, n, size).clone(memory_format=torch.channels_last)
            for start, padding in ((1, 0), (size - 1 - n, n + size)):
                strip = gradient.narrow(dim, padding, n)
                inner.narrow(dim, start, n).add_(strip.flip(dim) if n > 1 else strip)  # one line needs no kernel to flip it
            gradient = inner
        return gradient, None


@lru_cache(maxsize=64)
def reflected_indices(B, H, W, n, device):
    """For each pixel of a padded (B, H + 2n, W + 2n), flattened: the index of the pixel of (B, H, W) that it copies."""
    rows, columns = (size - 1 - (size - 1 - torch.arange(-n, size + n, device=device).abs()).abs() for size in (H, W))
    images = torch.arange(B, device=device)[:, None, None] * H * W
    return (images + rows[:, None] * W + columns).flatten()


def reflect_pad(x, n):
    """Pad by n mirrored pixels, n < H, W: (B, C, H, W) -> (B, C, H + 2n, W + 2n) of the same dtype."""
    if x.device.type != "cpu" and torch.is_grad_enabled() and x.requires_grad:
        return ReflectPad2d.apply(x, n)
    with torch.autocast("cpu", enabled=False):  # autocast would copy to float32 and back
        return F.pad(x, (n,) * 4, "reflect")  # a single operator, which can be exported


class ReflectConv2d(nn.Conv2d):
    """Convolution with reflection padding that keeps the size of its input; kernel_size is odd.

    before_norm: a norm follows, which cancels the bias. The bias stays a parameter, so that published weights load, but is
    neither added nor trained, unless you set its requires_grad; that saves 5 to 9% of a training step on a GPU.
    """

    def __init__(self, in_channels, out_channels, kernel_size, before_norm=True):
        super().__init__(in_channels, out_channels, kernel_size)
        self.before_norm = before_norm
        self.bias.requires_grad_(not before_norm)

    def forward(self, x):
        x = reflect_pad(x, self.kernel_size[0] // 2)
        return F.conv2d(x, self.weight, None if self.before_norm and not self.bias.requires_grad else self.bias)


class Downsample(nn.Module):
    """Blur with (1, 2, 1) / 4, keep pixels 0, 2, 4, ...: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)); Zhang 2019."""

    def __init__(self, channels):
        super().__init__()
        kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", kernel.outer(kernel).expand(channels, 1, 3, 3).clone(), persistent=False)

    def forward(self, x):
        return F.conv2d(reflect_pad(x, 1), self.kernel.to(x.dtype), stride=2, groups=x.shape[1])


class UpsampleConv2d(nn.Conv2d):
    """Insert zeros, blur, convolve: (B, C, h, w) -> (B, out, H, W), H in {2h - 1, 2h}. Output 2i is centred on input i."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3, padding=1)
        kernel = torch.tensor([1.0, 2.0, 1.0]) / 2  # not / 4: every second pixel under the kernel is an inserted zero
        self.register_buffer("kernel", kernel.outer(kernel).expand(in_channels, 1, 3, 3).clone(), persistent=False)

    def forward(self, x, output_size):
        x = torch.cat([x, x[..., -1:]], dim=3)  # repeat the last column and row
        x = torch.cat([x, x[..., -1:, :]], dim=2)
        x = F.conv_transpose2d(x, self.kernel.to(x.dtype), stride=2, padding=1, groups=x.shape[1])
        return super().forward(x[..., : output_size[0], : output_size[1]])


class ResnetBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))) with 3x3 convolutions: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.block = nn.Sequential(ReflectConv2d(c, c, 3), *norm_relu(c), ReflectConv2d(c, c, 3), InstanceNorm2d(c))

    def forward(self, x):
        return x + self.block(x)


class ResnetGenerator(nn.Module):
    """Translator G of stage 1. Its first half is the encoder G_enc of the PatchNCE loss.

    generator(x): (B, in_channels, H, W) in [-1, 1] -> (B, out_channels, H, W) in [-1, 1]; any H, W >= 16, else ValueError.
    generator(x, return_features=True) -> (image, features); generator.encode(x) -> features: the five layers of Park et al.
    2020, which are the pixels, both downsampling convolutions before their norm, and the first and fifth residual blocks.
    `feature_channels` lists their channels.

    Architecture of Johnson et al. 2016 as in Zhu et al. 2017: c7s1-64, d128, d256, n_blocks x R256, u128, u64, c7s1-3, with
    instance norm. With `antialias`, a convolution and blurred resampling replace each strided one, as in Park et al. 2020.
    With `residual` (ours) the last layer adds to the input, before the tanh, and begins at zero: G(x) = 0.98 x at first.
    """

    def __init__(self, in_channels=3, out_channels=3, base_channels=64, n_blocks=9, antialias=False, residual=False):
        super().__init__()
        if n_blocks < 5:
            raise ValueError(f"n_blocks is {n_blocks}: must be 5 or more, because PatchNCE uses the fifth residual block")
        self.arguments = dict(in_channels=in_channels, out_channels=out_channels, base_channels=base_channels,
                              n_blocks=n_blocks, antialias=antialias, residual=residual)  # fmt: skip
        self.residual, c = residual, base_channels
        self.feature_channels = (in_channels, 2 * c, 4 * c, 4 * c, 4 * c)
        stride, pool = (1, Downsample) if antialias else (2, nn.Identity)
        upsample = UpsampleConv2d if antialias else partial(nn.ConvTranspose2d, kernel_size=3, stride=2, padding=1)
        self.stem = ReflectConv2d(in_channels, c, 7)  # modules are created in the order in which data passes through them
        self.stem_norm = norm_relu(c)
        self.down1 = nn.Conv2d(c, 2 * c, 3, stride=stride, padding=1)
        self.down1_norm = norm_relu(2 * c).append(pool(2 * c))
        self.down2 = nn.Conv2d(2 * c, 4 * c, 3, stride=stride, padding=1)
        self.down2_norm = norm_relu(4 * c).append(pool(4 * c))
        self.blocks = nn.Sequential(*(ResnetBlock(4 * c) for _ in range(n_blocks)))
        self.up1 = upsample(4 * c, 2 * c)
        self.up1_norm = norm_relu(2 * c)
        self.up2 = upsample(2 * c, c)
        self.up2_norm = norm_relu(c)
        self.head = ReflectConv2d(c, out_channels, 7, before_norm=False)
        init_normal(self)
        if residual:
            nn.init.zeros_(self.head.weight)

    def encode(self, x):
        """(B, in_channels, H, W) -> the five feature maps; stops after the fifth residual block."""
        if min(x.shape[-2:]) < 16:
            raise ValueError(f"image is {x.shape[-2]}x{x.shape[-1]}: the generator needs at least 16x16")
        down1 = self.down1(self.stem_norm(self.stem(x)))  # (B, 2c, H/2, W/2); with antialias (B, 2c, H, W)
        down2 = self.down2(self.down1_norm(down1))  # (B, 4c, H/4, W/4); with antialias (B, 4c, H/2, W/2)
        block1 = self.blocks[0](self.down2_norm(down2))  # (B, 4c, H/4, W/4)
        return [x, down1, down2, block1, self.blocks[1:5](block1)]

    def decode(self, features):
        """The five feature maps -> image. Uses the last map, the size of the first and, if residual, its pixels."""
        height, width = features[0].shape[-2:]
        x = self.blocks[5:](features[-1])
        # Explicit output sizes: with a fixed output padding, odd sizes would come out shifted or cropped.
        x = self.up1_norm(self.up1(x, output_size=((height + 1) // 2, (width + 1) // 2)))
        x = self.head(self.up2_norm(self.up2(x, output_size=(height, width))))
        if self.residual:
            x = x + torch.atanh(0.98 * features[0])  # 0.98: finite where the input is black or white
        return torch.tanh(x)

    def forward(self, x, return_features=False):
        features = self.encode(x)
        return (self.decode(features), features) if return_features else self.decode(features)


class PatchDiscriminator(nn.Module):
    """PatchGAN of Isola et al. 2017: (B, in_channels, H, W) in [-1, 1] -> (B, 1, h, w), one logit per overlapping patch.

    C64-C128-C256-C512, 4x4 convolutions, no norm on the first. A patch is 70x70 pixels with n_layers = 3 (84x84 antialiased).
    """

    def __init__(self, in_channels=3, base_channels=64, n_layers=3, antialias=False):
        super().__init__()
        layers, channels = [], in_channels
        for n in range(n_layers + 1):
            out, stride = base_channels * min(2**n, 8), 2 if n < n_layers else 1
            layers.append(nn.Conv2d(channels, out, 4, stride=1 if antialias else stride, padding=1))
            layers += [InstanceNorm2d(out)] * (n > 0) + [nn.LeakyReLU(0.2, inplace=True)]
            layers += [Downsample(out)] * (antialias and stride == 2)
            channels = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))
        init_normal(self)

    def forward(self, x):
        return self.layers(x)


class PatchProjector(nn.Module):
    """Projection heads H_l of the PatchNCE loss: one two-layer MLP per feature layer; unit-length outputs.

    channels: number of channels per layer, e.g. `ResnetGenerator.feature_channels`.
    projector(features, locations): L maps (B, C_l, H_l, W_l), L index vectors (S_l,) -> L tensors (B, S_l, width), float32
    or higher. The heads are built here, not at the first batch, so that optimisers and checkpoints include them.
    """

    def __init__(self, channels, width=256):  # Park et al. 2020; not in the paper
        super().__init__()
        mlps = (nn.Sequential(nn.Linear(c, width), nn.ReLU(inplace=True), nn.Linear(width, width)) for c in channels)
        self.heads = nn.ModuleList(mlps)
        init_normal(self)

    def forward(self, features, locations):
        vectors = []
        for head, feature, location in zip(self.heads, features, locations, strict=True):
            # (B, C, H, W) -> (B, H*W, C) -> (B, S, C); in channels_last the permutation does not copy
            vector = head(feature.permute(0, 2, 3, 1).flatten(1, 2)[:, location])
            precise = torch.promote_types(vector.dtype, torch.float32)  # half precision is too coarse for the loss
            vectors.append(F.normalize(vector.to(precise), dim=-1))
        return vectors


def sample_locations(features, num_patches):
    """L maps (B, C_l, H_l, W_l) -> L random vectors of min(num_patches, H_l * W_l) distinct indices into the positions."""
    return [torch.randperm(f.shape[-2] * f.shape[-1], device=f.device)[:num_patches] for f in features]


def init_normal(network):
    """Draw weights from N(0, 0.02^2), set biases to 0, as Zhu et al. 2017 (Park et al. 2020's code: Xavier, gain 0.02)."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class UNet(nn.Module):
    """Task model (stages 3, 4), U-Net on an EfficientNet: (B, 3, H, W) in [0, 1] -> (B, num_classes, H, W) logits; H, W >= 32
    (in training with a single image: above 32).

    encoder: efficientnet-b0 to -b7. encoder_weights: None (random), "imagenet" (downloaded), or a file of efficientnet-pytorch.
    Raises ValueError if either is unusable. ImageNet's normalisation is built in. unet(x, return_features=True) -> (logits,
    {name: map}), "encoder1" (stride 2) to "encoder5" (32), "decoder1" (16) to "decoder5" (1); channels: `feature_channels`.
    """

    DECODER_CHANNELS = (256, 128, 64, 32, 16)  # (ours; segmentation_models.pytorch's, see docs/differences.md)

    def __init__(self, num_classes=19, encoder="efficientnet-b3", encoder_weights=None):
        super().__init__()
        self.arguments = dict(num_classes=num_classes, encoder=encoder)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.encoder, self.encoder_frozen = efficientnet(encoder, encoder_weights), False
        blocks = self.encoder._blocks
        self.strided = [i for i, block in enumerate(blocks) if block._depthwise_conv.stride == (2, 2)]
        skips = [blocks[i - 1]._project_conv.out_channels for i in (*self.strided, len(blocks))]  # at strides 2, 4, 8, 16, 32
        self.decoder, channels = nn.ModuleList(), skips[-1]
        for skip, out in zip([*skips[-2::-1], 0], self.DECODER_CHANNELS, strict=True):
            layers = []
            for c in (channels + skip, out):  # no bias: BatchNorm would cancel it
                layers += [nn.Conv2d(c, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            self.decoder.append(nn.Sequential(*layers))
            channels = out
        self.head = nn.Conv2d(channels, num_classes, 1)
        self.feature_channels = {f"encoder{i}": c for i, c in enumerate(skips, 1)}
        self.feature_channels |= {f"decoder{i}": c for i, c in enumerate(self.DECODER_CHANNELS, 1)}

    def freeze_encoder(self, frozen=True):
        """Freeze or unfreeze the encoder; while frozen, its BatchNorm stays in eval mode."""
        self.encoder_frozen = frozen
        self.encoder.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.encoder_frozen)
        return self

    def forward(self, x, return_features=False):
        size, net, maps = x.shape[-2:], self.encoder, []  # maps: the encoder's at strides 2, 4, 8, 16 and 32
        x = (x - self.mean) / self.std
        x = net._swish(net._bn0(net._conv_stem(x)))
        for i, block in enumerate(net._blocks):
            if i in self.strided:
                maps.append(x)
            # Drop-connect grows linearly with depth (Tan and Le 2019). The block applies it only in training mode.
            x = block(x, drop_connect_rate=net._global_params.drop_connect_rate * i / len(net._blocks))
        features = {f"encoder{i}": f for i, f in enumerate([*maps, x], 1)}
        for i, block in enumerate(self.decoder, 1):
            skip = maps.pop() if maps else None
            with torch.autocast(x.device.type, enabled=False):  # autocast would copy to float32
                x = F.interpolate(x, size if skip is None else skip.shape[-2:])  # nearest; to the skip's size, which may be odd
            x = block(x if skip is None else torch.cat([x, skip], dim=1))
            features[f"decoder{i}"] = x
        logits = self.head(x)
        return (logits, features) if return_features else logits


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of EfficientNet, (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)), stride 1 or 2.

    Padded as in TensorFlow. On a CPU in float32 even under autocast: in bf16 the weight gradient takes 4 to 9 times as long.
    """

    def __init__(self, channels, kernel_size, stride):
        padding = kernel_size // 2 if stride == 1 else 0  # with stride 1 the padding is symmetric: no separate copy
        super().__init__(channels, channels, kernel_size, stride, padding, groups=channels, bias=False)

    def forward(self, x):
        if self.stride[0] == 2:  # pad by kernel_size - 2 in all, plus 1 if the size is odd; an odd pixel goes right or below
            sums = [self.kernel_size[0] - 2 + size % 2 for size in (x.shape[-1], x.shape[-2])]
            x = F.pad(x, [side for total in sums for side in (total // 2, total - total // 2)])
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def efficientnet(name, weights=None):
    """The efficientnet-pytorch network `name` without its classification head; weights and ValueError as for `UNet`."""
    from efficientnet_pytorch import EfficientNet, utils

    if name not in utils.url_map:
        raise ValueError(f"encoder {name!r}: unknown; choose efficientnet-b0 to efficientnet-b7")
    # image_size=None: pad for the input's size, not for ImageNet's, which shifts features. batch_norm_momentum=0.9: running
    # statistics move by 10% per step, torch's default. The package's 1% is outdated when a short training is evaluated.
    network = EfficientNet.from_name(name, image_size=None, batch_norm_momentum=0.9)
    if weights is not None:
        load, source = torch.load, weights
        if weights == "imagenet":
            load, source = partial(torch.hub.load_state_dict_from_url, check_hash=True), utils.url_map[name]
        try:
            network.load_state_dict(load(source, map_location="cpu", weights_only=True))
        except Exception as error:  # no connection, a wrong hash, a damaged file, a file of another network
            reason, remedy = str(error).partition("\n")[0].partition(". ")[0], "give its weights with --encoder-weights FILE"
            raise ValueError(f"{name}: cannot load {source} ({reason}); {remedy}") from error
    for block in network._blocks:
        conv = block._depthwise_conv
        block._depthwise_conv = DepthwiseConv2d(conv.in_channels, conv.kernel_size[0], conv.stride[0])
        block._depthwise_conv.weight = conv.weight
    network.set_swish(memory_efficient=False)  # torch's SiLU: faster, but stores one more activation per layer
    del network._conv_head, network._bn1, network._avg_pooling, network._dropout, network._fc  # unused by the U-Net
    return network


class FeatureDiscriminator(nn.Sequential):
    """D_feat of stage 4: (B, in_channels, h, w) -> (B, 1, h, w) logits, positive for translated source."""

    def __init__(self, in_channels, width=256):
        relu = nn.LeakyReLU(0.2, inplace=True)  # (ours; Hoffman et al. 2018: 512-256-2, ReLU, Dropout2d)
        first, second = nn.Conv2d(in_channels, width, 1), nn.Conv2d(width, width, 1)
        super().__init__(first, relu, second, relu, nn.Conv2d(width, 1, 1))


def network_state(network, width, classes=None, colours=None):
    """Content of weights.pt: a ResnetGenerator or UNet; the width, classes and ColourTransfer state of its training frames."""
    state = dict(network=type(network).__name__, arguments=network.arguments, state_dict=network.state_dict())
    return state | dict(width=width, classes=classes, colours=colours)


def load_network(path, expected=None, device="cpu"):
    """Load a network in eval mode from a run or its weights.pt, with attributes width, classes, colours (`network_state`).

    expected: ResnetGenerator or UNet, if the file must hold that class. Raises OSError if the file cannot be read, and
    ValueError naming it if it holds another class or no network. Executes no code from it (`weights_only`).
    """
    path = os.path.join(path, "weights.pt") if os.path.isdir(path) else path
    with open(path, "rb") as file:
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            network = {"ResnetGenerator": ResnetGenerator, "UNet": UNet}[saved["network"]](**saved["arguments"])
            network.load_state_dict(saved["state_dict"])
            network.width, network.classes, network.colours = saved["width"], saved.get("classes"), saved.get("colours")
        except ImportError:  # efficientnet-pytorch
            raise
        except Exception as error:  # a damaged file can raise any type
            raise ValueError(f"{path}: not the weights.pt of a finished run, or too old ({type(error).__name__})") from error
    if expected is not None and not isinstance(network, expected):
        raise ValueError(f"{path}: holds a {type(network).__name__}; a {expected.__name__} is needed")
    return network.to(device).eval()
