"""The networks of CLADA: image translator, its discriminator and projection head, task model, feature discriminator.

Copies alone into other projects: needs torch, and efficientnet-pytorch for the UNet. It is no command.

    generator = ResnetGenerator()                            # stage 1: G, and the encoder G_enc of the PatchNCE loss
    image, features = generator(x, return_features=True)     # x: (B, 3, H, W) in [-1, 1]
    logits = UNet(encoder="efficientnet-b3")(photo)          # stage 3: F; photo: (B, 3, H, W) in [0, 1]
    generator = load_network("RUN/weights.pt")               # what a finished run leaves

References: Johnson et al. 2016 and Zhu et al. 2017 (generator), Isola et al. 2017 (PatchGAN), Park et al. 2020 (features
and projection head), Ronneberger et al. 2015 and Tan and Le 2019 (task model), Hoffman et al. 2018 (feature discriminator).
"""

import hashlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Image translation (stage 1)


class InstanceNorm2d(nn.InstanceNorm2d):
    """Instance norm without affine parameters, fast for one image in channels_last.

    For B = 1 the statistics of batch norm *are* those of instance norm, and its kernel keeps the channels_last layout,
    where instance norm copies every tensor to the default layout and back.
    """

    def forward(self, x):
        if x.shape[0] == 1:
            return F.batch_norm(x, None, None, training=True, eps=self.eps)
        return super().forward(x)


class ReflectPad2d(torch.autograd.Function):
    """Reflection padding, (B, C, H, W) -> (B, C, H + 2n, W + 2n): F.pad's values, in the memory format of x.

    CUDA's own kernel returns the default format whatever it gets, which costs a network in channels_last a copy before
    and after it, and its backward adds with atomics, in no fixed order. Strips of the border are copied here instead.
    """

    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        for dim in (3, 2):
            before, after = x.narrow(dim, 1, n), x.narrow(dim, x.shape[dim] - 1 - n, n)
            x = torch.cat([before.flip(dim), x, after.flip(dim)], dim)
        return x

    @staticmethod
    def backward(ctx, gradient):
        n = ctx.n
        for dim in (2, 3):
            size = gradient.shape[dim] - 2 * n
            inner = gradient.narrow(dim, n, size).clone()
            inner.narrow(dim, 1, n).add_(gradient.narrow(dim, 0, n).flip(dim))
            inner.narrow(dim, size - 1 - n, n).add_(gradient.narrow(dim, n + size, n).flip(dim))
            gradient = inner
        return gradient, None


def reflect_pad(x, n):
    """Mirror n pixels beyond each border, in the precision of x and, where CUDA computes gradients, in its memory format."""
    if x.device.type == "cpu":  # where autocast would copy to float32 and back, and F.pad is the faster one
        with torch.autocast("cpu", enabled=False):
            return F.pad(x, (n,) * 4, "reflect")
    if torch.is_grad_enabled() and x.requires_grad:
        return ReflectPad2d.apply(x, n)
    return F.pad(x, (n,) * 4, "reflect")  # one operator, which exports


class ReflectConv2d(nn.Conv2d):
    """A convolution that mirrors what it needs beyond the border and keeps the size; kernel_size is odd."""

    def forward(self, x):
        return super().forward(reflect_pad(x, self.kernel_size[0] // 2))


class Downsample(nn.Module):
    """Blur with the binomial kernel (1, 2, 1) / 4 and keep every second pixel: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)).

    Zhang 2019, "Making convolutional networks shift-invariant again". Output i is centred on input 2i.
    """

    def __init__(self, channels):
        super().__init__()
        kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", kernel.outer(kernel).expand(channels, 1, 3, 3).clone(), persistent=False)

    def forward(self, x):
        return F.conv2d(reflect_pad(x, 1), self.kernel.to(x.dtype), stride=2, groups=x.shape[1])


class Upsample(nn.Module):
    """The counterpart of `Downsample`: zero insertion and the same blur, (B, C, h, w) -> (B, C, H, W), H in {2h-1, 2h}.

    Output 2i is centred on input i, so that down and up together shift nothing.
    """

    def __init__(self, channels):
        super().__init__()
        kernel = torch.tensor([1.0, 2.0, 1.0]) / 2  # of the inserted zeros, half are multiplied: each phase sums to one
        self.register_buffer("kernel", kernel.outer(kernel).expand(channels, 1, 3, 3).clone(), persistent=False)

    def forward(self, x, output_size):
        x = torch.cat([x, x[..., -1:]], dim=3)  # the last pixel's neighbour on the right, and below
        x = torch.cat([x, x[..., -1:, :]], dim=2)
        x = F.conv_transpose2d(x, self.kernel.to(x.dtype), stride=2, padding=1, groups=x.shape[1])
        return x[..., : output_size[0], : output_size[1]]


class ResnetBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))) with 3x3 convolutions: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.block = nn.Sequential(
            ReflectConv2d(channels, channels, 3),
            InstanceNorm2d(channels),
            nn.ReLU(inplace=True),
            ReflectConv2d(channels, channels, 3),
            InstanceNorm2d(channels),
        )

    def forward(self, x):
        return x + self.block(x)


class ResnetGenerator(nn.Module):
    """The translator G of stage 1 and, in its first half, the encoder G_enc of the PatchNCE loss.

    generator(x): (B, in_channels, H, W) in [-1, 1] -> (B, out_channels, H, W) in [-1, 1], for every H, W >= 16.
    generator(x, return_features=True) -> (image, features), generator.encode(x) -> features: the five layers of Park et
    al. 2020: the pixels, the outputs of the first and of the second downsampling convolution (before their norm), the
    outputs of the first and of the fifth residual block. Their channels stand in `feature_channels`.

    Zhu et al. 2017's ResNet generator (c7s1-64, d128, d256, R256 x n_blocks, u128, u64, c7s1-3), instance norm. With
    `antialias` the strided convolutions become convolutions followed by blurred resampling, as in Park et al. 2020.
    """

    def __init__(self, in_channels=3, out_channels=3, base_channels=64, n_blocks=9, antialias=False):
        super().__init__()
        if n_blocks < 5:
            raise ValueError(f"n_blocks is {n_blocks}: the PatchNCE loss reads the fifth residual block, so 5 or more")
        self.arguments = dict(
            in_channels=in_channels,
            out_channels=out_channels,
            base_channels=base_channels,
            n_blocks=n_blocks,
            antialias=antialias,
        )
        c = base_channels
        self.feature_channels = (in_channels, 2 * c, 4 * c, 4 * c, 4 * c)
        stride = 1 if antialias else 2

        def norm_relu(channels):
            return nn.Sequential(InstanceNorm2d(channels), nn.ReLU(inplace=True))

        # Modules stand in the order in which data passes them.
        self.stem = ReflectConv2d(in_channels, c, 7)
        self.stem_norm = norm_relu(c)
        self.down1 = nn.Conv2d(c, 2 * c, 3, stride=stride, padding=1)
        self.down1_norm = norm_relu(2 * c)
        self.down2 = nn.Conv2d(2 * c, 4 * c, 3, stride=stride, padding=1)
        self.down2_norm = norm_relu(4 * c)
        self.blocks = nn.ModuleList(ResnetBlock(4 * c) for _ in range(n_blocks))
        if antialias:
            self.down1_norm.append(Downsample(2 * c))
            self.down2_norm.append(Downsample(4 * c))
            self.blur1, self.blur2 = Upsample(4 * c), Upsample(2 * c)
            self.up1 = nn.Conv2d(4 * c, 2 * c, 3, padding=1)
            self.up1_norm = norm_relu(2 * c)
            self.up2 = nn.Conv2d(2 * c, c, 3, padding=1)
        else:
            self.up1 = nn.ConvTranspose2d(4 * c, 2 * c, 3, stride=2, padding=1)
            self.up1_norm = norm_relu(2 * c)
            self.up2 = nn.ConvTranspose2d(2 * c, c, 3, stride=2, padding=1)
        self.up2_norm = norm_relu(c)
        self.head = ReflectConv2d(c, out_channels, 7)
        init_normal(self)

    def encode(self, x):
        """(B, in_channels, H, W) -> the five feature maps; stops after the fifth residual block."""
        if min(x.shape[-2:]) < 16:
            raise ValueError(f"the generator takes images of 16x16 or more, not {x.shape[-2]}x{x.shape[-1]}")
        down1 = self.down1(self.stem_norm(self.stem(x)))  # (B, 2c, H/2, W/2), with antialias (B, 2c, H, W)
        down2 = self.down2(self.down1_norm(down1))  # (B, 4c, H/4, W/4), with antialias (B, 4c, H/2, W/2)
        block1 = self.blocks[0](self.down2_norm(down2))  # (B, 4c, H/4, W/4)
        block5 = block1
        for block in self.blocks[1:5]:
            block5 = block(block5)
        return [x, down1, down2, block1, block5]

    def decode(self, features):
        """The five feature maps -> the image; the second half of the generator, of which only the last map is read."""
        x = features[-1]
        for block in self.blocks[5:]:
            x = block(x)
        # The output sizes undo the rounding of odd sizes, which a fixed output padding would shift or crop.
        height, width = features[0].shape[-2:]
        full, half = (height, width), ((height + 1) // 2, (width + 1) // 2)
        if self.arguments["antialias"]:
            x = self.up1_norm(self.up1(self.blur1(x, half)))
            x = self.up2_norm(self.up2(self.blur2(x, full)))
        else:
            x = self.up1_norm(self.up1(x, output_size=half))
            x = self.up2_norm(self.up2(x, output_size=full))
        return torch.tanh(self.head(x))

    def forward(self, x, return_features=False):
        features = self.encode(x)
        image = self.decode(features)
        return (image, features) if return_features else image


class PatchDiscriminator(nn.Module):
    """PatchGAN of Isola et al. 2017: (B, in_channels, H, W) in [-1, 1] -> (B, 1, h, w) logits, one for a 70x70 patch each.

    70 pixels is the receptive field at n_layers = 3: C64-C128-C256-C512, 4x4 convolutions, instance norm but on the first.
    """

    def __init__(self, in_channels=3, base_channels=64, n_layers=3, antialias=False):
        super().__init__()
        layers, channels = [], in_channels
        for n in range(n_layers + 1):
            out, strided = base_channels * min(2**n, 8), n < n_layers
            layers.append(nn.Conv2d(channels, out, 4, stride=2 if strided and not antialias else 1, padding=1))
            if n > 0:
                layers.append(InstanceNorm2d(out))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            if strided and antialias:
                layers.append(Downsample(out))
            channels = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))
        init_normal(self)

    def forward(self, x):
        return self.layers(x)


class PatchProjector(nn.Module):
    """The projection heads H_l of the PatchNCE loss: a two-layer MLP a feature layer, output of unit length.

    channels: the channels of each layer (`ResnetGenerator.feature_channels`).
    projector(features, locations): L maps (B, C_l, H_l, W_l) and L index vectors (S_l,) -> L tensors (B, S_l, width).
    Built at once, not at the first batch as in the published code, so that a checkpoint and an optimiser hold it whole.
    """

    def __init__(self, channels, width=256):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(c, width), nn.ReLU(inplace=True), nn.Linear(width, width)) for c in channels
        )
        init_normal(self)

    def forward(self, features, locations):
        vectors = []
        for head, feature, location in zip(self.heads, features, locations, strict=True):
            # (B, C, H, W) -> (B, H*W, C) -> (B, S, C); in channels_last the permutation costs nothing
            patches = feature.permute(0, 2, 3, 1).flatten(1, 2)[:, location]
            vectors.append(F.normalize(promoted(head(patches)), dim=-1))
        return vectors


def promoted(x):
    """In float32 at least: fp16 and bf16 cannot resolve what follows."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sample_locations(features, num_patches):
    """Draw the S_l locations a layer at which patches are compared, without replacement, from torch's global generator.

    L maps (B, C_l, H_l, W_l) -> L index vectors into H_l * W_l, of min(num_patches, H_l * W_l) entries each.
    """
    return [torch.randperm(f.shape[-2] * f.shape[-1], device=f.device)[:num_patches] for f in features]


def init_normal(network, deviation=0.02):
    """Weights from N(0, 0.02^2) and zero biases, as Zhu et al. 2017 start every translation network."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0.0, deviation)
            nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Semantic segmentation (stages 3 and 4)


class UNet(nn.Module):
    """The task model F: a U-Net over an EfficientNet encoder, (B, 3, H, W) in [0, 1] -> (B, num_classes, H, W) logits.

    encoder: efficientnet-b0 to efficientnet-b7. encoder_weights: None (random), "imagenet" (downloaded from where the
    efficientnet-pytorch package has them) or the path of a file in that package's format. Any H, W from 32 up.
    unet(x, return_features=True) -> (logits, features): a dict of the ten intermediate maps, "encoder1" (stride 2) to
    "encoder5" (stride 32) and "decoder1" (stride 16) to "decoder5" (stride 1); their channels: `feature_channels`.
    ImageNet's normalisation happens inside, so that a saved model takes plain [0, 1] images.
    """

    DECODER_CHANNELS = (256, 128, 64, 32, 16)

    def __init__(self, num_classes=19, encoder="efficientnet-b3", encoder_weights=None):
        super().__init__()
        self.arguments = dict(num_classes=num_classes, encoder=encoder)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.encoder = efficientnet(encoder, encoder_weights)
        self.encoder_frozen = False

        blocks = self.encoder._blocks
        self.strided = [i for i, block in enumerate(blocks) if block._depthwise_conv.stride == (2, 2)]
        ends = [*(i - 1 for i in self.strided), len(blocks) - 1]  # the last block before each halving, and the last
        skips = [blocks[i]._project_conv.out_channels for i in ends]  # at strides 2, 4, 8, 16, 32
        self.decoder = nn.ModuleList()
        channels = skips[-1]
        for skip, out in zip([*skips[-2::-1], 0], self.DECODER_CHANNELS, strict=True):
            self.decoder.append(nn.Sequential(*conv_bn_relu(channels + skip, out), *conv_bn_relu(out, out)))
            channels = out
        self.head = nn.Conv2d(channels, num_classes, 1)
        self.feature_channels = {f"encoder{i}": c for i, c in enumerate(skips, 1)}
        self.feature_channels |= {f"decoder{i}": c for i, c in enumerate(self.DECODER_CHANNELS, 1)}

    def freeze_encoder(self, frozen=True):
        """No gradients for the encoder and, whatever train() says, fixed BatchNorm statistics; or the contrary."""
        self.encoder_frozen = frozen
        self.encoder.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self

    def encode(self, x):
        """(B, 3, H, W) in [0, 1] -> five maps at strides 2, 4, 8, 16 and 32."""
        net, maps = self.encoder, []
        x = (x - self.mean) / self.std
        x = net._swish(net._bn0(net._conv_stem(x)))
        for i, block in enumerate(net._blocks):
            if i in self.strided:
                maps.append(x)
            # Drop-connect grows linearly with depth (Tan and Le 2019); the block applies it in training mode only.
            x = block(x, drop_connect_rate=net._global_params.drop_connect_rate * i / len(net._blocks))
        return [*maps, x]

    def forward(self, x, return_features=False):
        size = x.shape[-2:]
        maps = self.encode(x)
        features = {f"encoder{i}": f for i, f in enumerate(maps, 1)}
        x = maps.pop()
        for i, block in enumerate(self.decoder, 1):
            skip = maps.pop() if maps else None
            with torch.autocast(x.device.type, enabled=False):  # which would copy pixels in float32
                x = F.interpolate(x, size if skip is None else skip.shape[-2:])  # nearest, to the skip's size: odd ones fit
            x = block(x if skip is None else torch.cat([x, skip], dim=1))
            features[f"decoder{i}"] = x
        logits = self.head(x)
        return (logits, features) if return_features else logits


def conv_bn_relu(in_channels, out_channels):
    """The three modules of which the decoder is made; no bias before a batch norm."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


class DepthwiseConv2d(nn.Conv2d):
    """EfficientNet's depthwise convolution, (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)), stride 1 or 2.

    Padded as TensorFlow pads. A CPU computes it in float32 under autocast, too: in bf16 the weight gradient of a 5x5 kernel
    takes four to nine times as long (torch 2.14, AVX-512 with AMX), forward the two are alike.
    """

    def __init__(self, channels, kernel_size, stride):
        # At stride 1, half the kernel on each side: the convolution pads without a copy.
        super().__init__(
            channels, channels, kernel_size, stride, kernel_size // 2 if stride == 1 else 0, groups=channels, bias=False
        )

    def forward(self, x):
        if self.stride[0] == 2:  # by the size at hand: kernel_size - 2 for an even one, the odd pixel right and below
            sums = [self.kernel_size[0] - 2 + size % 2 for size in (x.shape[-1], x.shape[-2])]
            x = F.pad(x, [side for both in sums for side in (both // 2, both - both // 2)])
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def efficientnet(name, weights=None):
    """The efficientnet-pytorch network `name` without its classification head; weights as in `UNet`.

    Raises ValueError for a name that is none of efficientnet-b0 to -b7, and for weights that cannot be had or do not fit.
    """
    from efficientnet_pytorch import EfficientNet
    from efficientnet_pytorch.utils import url_map

    if name not in url_map:
        raise ValueError(f"encoder {name!r} is unknown: efficientnet-b0 to efficientnet-b7")
    # image_size=None: pad for the size at hand. By default the package pads for the one size a variant was trained at,
    # which shifts the features of all others.
    # batch_norm_momentum=0.9: running statistics move by 10% a step, as torch has it. The package's 1% suits 300k steps of
    # ImageNet; after a short training they lag so far behind that evaluation sees another network.
    options = {"image_size": None, "batch_norm_momentum": 0.9}
    network = EfficientNet.from_name(name, **options)
    if weights is not None:
        state = _download(url_map[name]) if weights == "imagenet" else _read_weights(weights)
        try:
            network.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"encoder weights {weights}: not a state_dict of {name}") from error
    for block in network._blocks:
        conv = block._depthwise_conv
        block._depthwise_conv = DepthwiseConv2d(conv.in_channels, conv.kernel_size[0], conv.stride[0])
        block._depthwise_conv.weight = conv.weight
    network.set_swish(memory_efficient=False)  # torch's own SiLU: faster, at the price of one stored activation a layer
    del network._conv_head, network._bn1, network._avg_pooling, network._dropout, network._fc  # the U-Net ends before
    return network


def _download(url):
    """The weights at an address whose file name ends in the start of their sha256, kept in torch.hub's folder."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        if path.parts[0] == "~":
            raise OSError("there is no home folder for it: set TORCH_HOME")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
    except OSError as error:
        raise ValueError(
            f"the ImageNet weights could not be downloaded ({error}): fetch {url} elsewhere and pass --encoder-weights FILE, "
            "or --encoder-weights none"
        ) from error
    expected, found = path.stem.rpartition("-")[2], hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(expected):
        raise ValueError(
            f"{path}: its sha256 begins with {found[:8]}, not {expected}: a damaged or foreign file? Remove it to have it "
            "downloaded again, or, to trust it as it is, pass it as --encoder-weights"
        )
    return _read_weights(path)


def _read_weights(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"encoder weights {path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises a dozen kinds for a file that is something else
        raise ValueError(f"encoder weights {path}: not a file that torch.load(weights_only=True) reads") from error


class FeatureDiscriminator(nn.Module):
    """D_feat of stage 4: (B, in_channels, h, w) features -> (B, 1, h, w) logits, positive for translated source.

    Three 1x1 convolutions, as Hoffman et al. 2018: each location is judged by its embedding alone.
    """

    def __init__(self, in_channels, width=256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, width, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, x):
        return self.layers(x)


# ---------------------------------------------------------------------------------------------------------------------


def network_state(network):
    """What weights.pt holds of a ResnetGenerator or a UNet: class, arguments and state_dict, nothing but plain data."""
    return {"network": type(network).__name__, "arguments": network.arguments, "state_dict": network.state_dict()}


def load_network(path, expected=None, device="cpu"):
    """Read a network that `network_state` describes from a file; it comes in evaluation mode.

    expected: the class it must be, ResnetGenerator or UNet. Raises ValueError naming the file where it is another or no
    network at all, OSError where it cannot be read. Nothing in the file is executed (`weights_only`).
    """
    with open(path, "rb") as file:
        try:
            saved = torch.load(file, map_location=device, weights_only=True)
            network_class = {"ResnetGenerator": ResnetGenerator, "UNet": UNet}[saved["network"]]
            if expected in (None, network_class):
                _check_arguments(network_class, saved["arguments"], saved["state_dict"])
                network = network_class(**saved["arguments"])
                network.load_state_dict(saved["state_dict"])
        except Exception as error:  # a damaged file raises whatever its bytes happen to mean
            raise ValueError(f"{path}: not the weights.pt of a finished run ({type(error).__name__})") from error
    if expected not in (None, network_class):
        raise ValueError(f"{path}: holds a {saved['network']}, where a {expected.__name__} is needed")
    return network.to(device).eval()


def _check_arguments(network_class, arguments, state):
    """Arguments from a file are those of `network_state` and fit its weights, before a network is built by them."""
    if network_class is UNet:
        names, fit = {"num_classes", "encoder"}, len(state["head.weight"]) == arguments["num_classes"]
    else:
        names = {"in_channels", "out_channels", "base_channels", "n_blocks", "antialias"}
        n_blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        fit = (len(state["stem.weight"]), n_blocks) == (arguments["base_channels"], arguments["n_blocks"])
    if arguments.keys() != names or not fit:
        raise ValueError("arguments and weights do not fit")
