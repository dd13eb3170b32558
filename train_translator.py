"""Stage 1 of CLADA: train the image translator G from source (game) to target (dashcam), unpaired and without labels.

    python train_translator.py --source gta5 --target cityscapes --out runs/fastcut_l5 --method fastcut_l5

Methods: `cut`, `fastcut` and `fastcut_l5` (PatchNCE, equation 4; Park et al. 2020) and the baseline `cyclegan` (Zhu et al.
2017). The defaults are the paper's: width 1024, crops of 400x400, batch 1, 400k iterations, and a learning rate that is
constant for the first half and then falls linearly to 0. Its base of 2e-4, unreadable in the scanned paper, and Adam, which
the paper does not name, are Zhu et al.'s. The same command resumes an unfinished run.
"""

from functools import partial

import torch
from torch.nn.functional import l1_loss
from torch.utils.data import StackDataset

import colours
import data
import models
import runtime
import training
from check_data import check_frames
from losses import discriminator_loss, gan_loss, patch_nce_loss
from optimization import GraphedStep, adam, backward_and_step, constant_then_linear, set_learning_rate, translator_layout

# Variants of equation 4: lambda_X, lambda_Y (the identity term), patches per layer (the paper; released FastCUT has 256).
VARIANTS = {"cut": (1.0, 1.0, 256), "fastcut": (10.0, 0.0, 16), "fastcut_l5": (5.0, 0.0, 16)}
LAMBDA_CYCLE = 10.0  # Zhu et al. 2017
POOL_SIZE = 50  # Zhu et al. 2017
BETAS = (0.5, 0.999)  # of Adam, Zhu et al. 2017; not in the paper


def parse_args(words=None):
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    layouts = "GTA5 or Cityscapes layout, or any folder of images; labels are not read"
    training.add_domain_arguments(parser, source=f"source images X, {layouts}", target=f"target images Y, {layouts}")
    add("--method", required=True, choices=("cyclegan", *VARIANTS), help="fastcut_l5 is the paper's")
    add("--base-channels", type=runtime.positive_int, default=64, help="channels of the first layer (default 64)")
    add("--antialias", action="store_true", help="blurred resampling, as in Park et al. 2020")
    text = "give each frame the colour statistics of a random target photograph first; G then adds to its input (ours)"
    add("--colour-transfer", action="store_true", help=text)
    add("--gan-loss", choices=("lsgan", "vanilla"), default="lsgan", help="form of equation 1 (default lsgan)")
    add("--lambda-x", type=runtime.non_negative, help="weight of PatchNCE (default: cut 1, fastcut 10, fastcut_l5 5)")
    add("--lambda-y", type=runtime.non_negative, help="weight of the identity term (default: cut 1, others 0)")
    add("--num-patches", type=runtime.positive_int, help="S, patches per layer (default: cut 256, others 16)")
    add("--flip-equivariance", action="store_true", help="mirror G's input with probability 1/2, and its query features back")
    identity = "weight of CycleGAN's identity loss (default 0; released: 5)"
    add("--identity-weight", type=runtime.non_negative, default=0.0, help=identity)
    training.add_arguments(parser, iterations=400_000, batch_size=1, crop_size="400", lr=2e-4)
    args = parser.parse_args(words)
    if min(args.crop_size) < 24:
        parser.error(f"--crop-size {min(args.crop_size)}: the discriminator needs crops of at least 24 pixels")
    if args.method == "cyclegan":
        if (args.lambda_x, args.lambda_y, args.num_patches, args.flip_equivariance) != (None, None, None, False):
            nce = "--lambda-x, --lambda-y, --num-patches and --flip-equivariance"
            parser.error(f"{nce} belong to PatchNCE, which cyclegan does not use")
    else:
        if args.identity_weight > 0:
            parser.error("--identity-weight belongs to cyclegan; use --lambda-y for the other methods' identity term")
        for name, value in zip(("lambda_x", "lambda_y", "num_patches"), VARIANTS[args.method], strict=True):
            if getattr(args, name) is None:
                setattr(args, name, value)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# CUT, FastCUT, FastCUT-L5


class ContrastiveTranslation:
    """Equation 4: L_GAN(G, D, X, Y) + lambda_X L_PatchNCE(G, H, X) + lambda_Y L_PatchNCE(G, H, Y)."""

    def __init__(self, args, device):
        self.args = args
        options = dict(base_channels=args.base_channels, antialias=args.antialias)
        self.G = _on(device, models.ResnetGenerator(**options, residual=args.colour_transfer))
        self.D = _on(device, models.PatchDiscriminator(**options))
        self.H = _on(device, models.PatchProjector(self.G.feature_channels))
        self.opt_G = adam([*self.G.parameters(), *self.H.parameters()], lr=args.lr, betas=BETAS)
        self.opt_D = adam(self.D.parameters(), lr=args.lr, betas=BETAS)
        self.state = dict(G=self.G, D=self.D, H=self.H, opt_G=self.opt_G, opt_D=self.opt_D)

    def step(self, x, y, autocast):
        """x, y: (B, 3, H, W) in [-1, 1] -> (translated x, losses by name)."""
        args, D = self.args, self.D
        with autocast:
            flipped = torch.rand((len(x), 1, 1, 1), device=x.device) < 0.5 if args.flip_equivariance else None
            fake, features_x = self.translate(x, flipped)
            loss_D = discriminator_loss(D(y), D(fake.detach()), args.gan_loss)
        backward_and_step(self.opt_D, loss_D)

        D.requires_grad_(False)
        with autocast:
            losses = {
                "G_gan": gan_loss(D(fake), True, args.gan_loss),
                "nce_x": self.patch_nce(features_x, self.encode(fake, flipped)),
            }
            loss_G = losses["G_gan"] + args.lambda_x * losses["nce_x"]
            if args.lambda_y > 0:  # the identity term: G keeps the content of target images
                identity, features_y = self.translate(y, flipped)
                losses["nce_y"] = self.patch_nce(features_y, self.encode(identity, flipped))
                loss_G = loss_G + args.lambda_y * losses["nce_y"]
        backward_and_step(self.opt_G, loss_G)
        D.requires_grad_(True)
        return mirror(fake, flipped), {"D": loss_D} | losses

    def translate(self, images, flipped):
        """Images (B, 3, H, W) -> (translations, mirrored where `flipped`; features of the images, never mirrored)."""
        if flipped is None:
            return self.G(images, return_features=True)
        translated = self.G(mirror(images, flipped))  # before no_grad: autocast would cache weights without a gradient
        with torch.no_grad():
            return translated, self.G.encode(images)

    def encode(self, translated, flipped):
        """The features of a translation, mirrored back where it is mirrored."""
        return [mirror(feature, flipped) for feature in self.G.encode(translated)]

    def patch_nce(self, features, features_translated):
        """Equation 3, averaged over layers: each patch of the translation must find the input's patch at its location."""
        locations = models.sample_locations(features, self.args.num_patches)
        queries = self.H(features_translated, locations)
        with torch.no_grad():  # no gradient through positives and negatives
            positives = self.H(features, locations)
        return sum(map(patch_nce_loss, queries, positives)) / len(queries)


# ---------------------------------------------------------------------------------------------------------------------
# CycleGAN, the baseline


class CycleTranslation:
    """Zhu et al. 2017: two generators G: X -> Y and G_back: Y -> X, two discriminators, and an L1 cycle loss."""

    def __init__(self, args, device):
        self.args = args
        options = dict(base_channels=args.base_channels, antialias=args.antialias)
        generators = (models.ResnetGenerator(**options, residual=args.colour_transfer) for _ in range(2))
        self.G, self.G_back = (_on(device, generator) for generator in generators)
        self.D_y, self.D_x = (_on(device, models.PatchDiscriminator(**options)) for _ in range(2))
        self.opt_G = adam([*self.G.parameters(), *self.G_back.parameters()], lr=args.lr, betas=BETAS)
        self.opt_D = adam([*self.D_y.parameters(), *self.D_x.parameters()], lr=args.lr, betas=BETAS)
        self.pool_y, self.pool_x = ImagePool(POOL_SIZE, device), ImagePool(POOL_SIZE, device)
        names = ("G", "G_back", "D_y", "D_x", "opt_G", "opt_D", "pool_y", "pool_x")
        self.state = {name: getattr(self, name) for name in names}

    def step(self, x, y, autocast):
        """x, y: (B, 3, H, W) in [-1, 1] -> (translated x, losses by name)."""
        args, G, G_back, D_y, D_x = self.args, self.G, self.G_back, self.D_y, self.D_x
        for discriminator in (D_y, D_x):
            discriminator.requires_grad_(False)
        with autocast:
            fake_y, fake_x = G(x), G_back(y)
            losses = {
                "G_gan": gan_loss(D_y(fake_y), True, args.gan_loss) + gan_loss(D_x(fake_x), True, args.gan_loss),
                "cycle": l1_loss(G_back(fake_y), x) + l1_loss(G(fake_x), y),
            }
            loss_G = losses["G_gan"] + LAMBDA_CYCLE * losses["cycle"]
            if args.identity_weight > 0:
                losses["identity"] = l1_loss(G(y), y) + l1_loss(G_back(x), x)
                loss_G = loss_G + args.identity_weight * losses["identity"]
        backward_and_step(self.opt_G, loss_G)

        for discriminator in (D_y, D_x):
            discriminator.requires_grad_(True)
        with autocast:
            loss_D = discriminator_loss(D_y(y), D_y(self.pool_y.exchange(fake_y.detach())), args.gan_loss)
            loss_D = loss_D + discriminator_loss(D_x(x), D_x(self.pool_x.exchange(fake_x.detach())), args.gan_loss)
        backward_and_step(self.opt_D, loss_D)
        return fake_y, {"D": loss_D} | losses


class ImagePool(training.PerProcess):
    """Image history for D: half of the time it sees an earlier translation (Shrivastava et al. 2017; Zhu et al. 2017).

    All decisions are made on the device, so that a CUDA graph can repeat them.
    """

    def __init__(self, size, device=None):
        self.size, self.images = size, None
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def exchange(self, images):
        """(B, 3, H, W) -> (B, 3, H, W).

        Until the pool is full, images are stored and returned. Then each is swapped with a stored one with probability 1/2.
        """
        if self.images is None:
            self.images = images.new_zeros((self.size, *images.shape[1:]))
        returned = torch.empty_like(images)  # in the same memory format
        for new, slot in zip(images, returned, strict=True):
            is_full = self.count == self.size
            draw, coin = torch.randint(self.size, (1,), device=images.device), torch.rand((), device=images.device)
            index = torch.where(is_full, draw, self.count)
            previous = self.images.index_select(0, index)[0]
            is_swapped = is_full & (coin < 0.5)
            slot.copy_(torch.where(is_swapped, previous, new))
            self.images.index_copy_(0, index, torch.where(is_swapped | ~is_full, new, previous)[None])
            self.count += ~is_full
        return returned

    def state_dict(self):
        return {"images": [] if self.images is None else self.images[: int(self.count)]}

    def load_state_dict(self, state):
        for image in state["images"]:  # at most `size`, which a new pool stores in this order
            self.exchange(image[None])


# ---------------------------------------------------------------------------------------------------------------------


def mirror(x, where):
    """Mirror images or features (B, C, H, W), left to right, where `where` (B, 1, 1, 1) is true; nowhere if it is None."""
    return x if where is None else torch.where(where, x.flip(3), x)


def _grid(**columns):
    return {title: (images + 1) / 2 for title, images in columns.items()}


def _on(device, network):
    return network.to(device, memory_format=translator_layout(device))


def main():
    args = parse_args()
    run = training.Run(args)
    exclude = data.read_names(args.exclude)
    source = data.list_frames(args.source, labelled=False, exclude=exclude)
    target = data.list_frames(args.target, args.target_splits, labelled=False, exclude=exclude)
    if run.is_finished(source=source, target=target):
        return
    for frames in (source, target):
        check_frames(frames, args.width, args.crop_size)
    run.end_check()
    torch.manual_seed(args.seed)
    translation = (CycleTranslation if args.method == "cyclegan" else ContrastiveTranslation)(args, run.device)
    transfer = state = None
    if args.colour_transfer:
        transfer = colours.ColourTransfer(colours.photograph_statistics(target, args.width), args.seed)
        state = transfer._asdict()
    run.restore(partial(models.network_state, translation.G, args.width, colours=state), **translation.state)

    crops = (args.width, args.crop_size, run.sample_count, args.seed)
    dataset = StackDataset(
        data.Crops(source, *crops, stream=0, cache=args.cache, transfer=transfer),
        data.Crops(target, *crops, stream=1, cache=args.cache),
    )
    layout, autocast = translator_layout(run.device), runtime.autocast(run.device, args.precision)
    step = GraphedStep(lambda x, y: translation.step(x, y, autocast), run.device)
    for iteration, batch in run.iterations(dataset):
        lr = constant_then_linear(iteration, args.iterations, args.lr)
        for optimizer in (translation.opt_G, translation.opt_D):
            set_learning_rate(optimizer, lr)
        x, y = (data.to_signed(images).contiguous(memory_format=layout) for images in batch)
        fake, losses = step(x, y)
        run.log(losses, grid=partial(_grid, source=x, translated=fake, target=y), lr=lr)
    run.finish(method=args.method)


if __name__ == "__main__":
    runtime.run_script(main)
