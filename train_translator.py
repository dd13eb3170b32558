"""Stage 1 of CLADA: train the image translator G from source (game) to target (dashcam), unpaired and without labels.

    python train_translator.py --source gta5 --target cityscapes --out runs/fastcut_l5 --method fastcut_l5

Methods: `cut`, `fastcut` and `fastcut_l5` (PatchNCE, equation 4; Park et al. 2020) and the baseline `cyclegan` (Zhu et al.
2017). Defaults are the paper's: width 1024, crops of 400x400, batch 1, 400k iterations, Adam at 2e-4, constant for the
first half and then linearly to 0. An unfinished run is resumed by the same command.
"""

import torch
from torch.utils.data import StackDataset

import data
import models
import optimization
import runtime
import training
from losses import gan_loss, patch_nce_loss

# Variants of equation 4: lambda_X, lambda_Y (the identity term), patches per layer. Park et al. 2020; the paper for L5.
VARIANTS = {"cut": (1.0, 1.0, 256), "fastcut": (10.0, 0.0, 16), "fastcut_l5": (5.0, 0.0, 16)}
LAMBDA_CYCLE = 10.0  # Zhu et al. 2017
POOL_SIZE = 50  # Zhu et al. 2017
BETAS = (0.5, 0.999)  # Adam's, Zhu et al. 2017


def parse_args(words=None):
    parser = runtime.parser(__doc__.split("\n\n")[0], __doc__)
    parser.add_argument(
        "--source",
        type=runtime.real_path,
        required=True,
        metavar="DIR",
        help="data set X, GTA5 or Cityscapes layout; labels unread",
    )
    parser.add_argument("--target", type=runtime.real_path, required=True, metavar="DIR", help="data set Y, likewise")
    parser.add_argument("--target-splits", default="train", help="Cityscapes splits, e.g. train,train_extra (default train)")
    parser.add_argument("--method", required=True, choices=("cyclegan", *VARIANTS))
    parser.add_argument("--base-channels", type=runtime.positive_int, default=64, help="of all networks (default 64)")
    parser.add_argument("--antialias", action="store_true", help="blurred resampling, as in Park et al. 2020")
    parser.add_argument("--gan-loss", choices=("lsgan", "vanilla"), default="lsgan", help="form of equation 1 (default lsgan)")
    parser.add_argument("--lambda-x", type=runtime.non_negative, help="PatchNCE weight (default: the method's)")
    parser.add_argument("--lambda-y", type=runtime.non_negative, help="PatchNCE weight of the identity term (likewise)")
    parser.add_argument("--num-patches", type=runtime.positive_int, help="S, patches per layer (likewise)")
    parser.add_argument(
        "--identity-weight",
        type=runtime.non_negative,
        default=0.0,
        help="CycleGAN's L1 identity loss (default 0; theirs 5)",
    )
    runtime.add_training_arguments(parser, iterations=400_000, batch_size=1, crop_size="400", lr=2e-4)
    args = parser.parse_args(words)
    if args.method == "cyclegan":
        if (args.lambda_x, args.lambda_y, args.num_patches) != (None, None, None):
            parser.error("--lambda-x, --lambda-y and --num-patches belong to PatchNCE, which cyclegan does not use")
    else:
        for name, value in zip(("lambda_x", "lambda_y", "num_patches"), VARIANTS[args.method], strict=True):
            if getattr(args, name) is None:
                setattr(args, name, value)
    return args


def discriminator_loss(discriminator, real, fake, kind):
    """Equation 1 as D sees it, halved as Zhu et al. 2017 to slow D relative to G; no gradient reaches the generator."""
    return (gan_loss(discriminator(real), True, kind) + gan_loss(discriminator(fake.detach()), False, kind)) / 2


# ---------------------------------------------------------------------------------------------------------------------
# CUT, FastCUT, FastCUT-L5


class ContrastiveTranslation:
    """Equation 4: L_GAN(G, D, X, Y) + lambda_X L_PatchNCE(G, H, X) + lambda_Y L_PatchNCE(G, H, Y)."""

    def __init__(self, args, device):
        self.args = args
        self.G = _on(device, models.ResnetGenerator(base_channels=args.base_channels, antialias=args.antialias))
        self.D = _on(device, models.PatchDiscriminator(base_channels=args.base_channels, antialias=args.antialias))
        self.H = _on(device, models.PatchProjector(self.G.feature_channels))
        self.opt_G = optimization.adam([*self.G.parameters(), *self.H.parameters()], lr=args.lr, betas=BETAS)
        self.opt_D = optimization.adam(self.D.parameters(), lr=args.lr, betas=BETAS)
        self.state = dict(G=self.G, D=self.D, H=self.H, opt_G=self.opt_G, opt_D=self.opt_D)

    def step(self, x, y, autocast):
        """x, y: (B, 3, H, W) in [-1, 1] -> (translated x, losses by name)."""
        args, G, D = self.args, self.G, self.D
        with autocast:
            fake, features_x = G(x, return_features=True)
            loss_D = discriminator_loss(D, y, fake, args.gan_loss)
        optimization.backward_and_step(self.opt_D, loss_D)

        D.requires_grad_(False)
        with autocast:
            losses = {
                "G_gan": gan_loss(D(fake), True, args.gan_loss),
                "nce_x": self.patch_nce(features_x, G.encode(fake)),
            }
            loss_G = losses["G_gan"] + args.lambda_x * losses["nce_x"]
            if args.lambda_y > 0:  # the identity term: a target image through G keeps its content
                identity, features_y = G(y, return_features=True)
                losses["nce_y"] = self.patch_nce(features_y, G.encode(identity))
                loss_G = loss_G + args.lambda_y * losses["nce_y"]
        optimization.backward_and_step(self.opt_G, loss_G)
        D.requires_grad_(True)
        return fake, {"D": loss_D} | losses

    def patch_nce(self, features, features_translated):
        """Equation 3, mean over layers: each patch of the translation finds the input's patch at its own place."""
        locations = models.sample_locations(features, self.args.num_patches)
        queries = self.H(features_translated, locations)
        with torch.no_grad():  # no gradient flows through positives and negatives
            positives = self.H(features, locations)
        return sum(map(patch_nce_loss, queries, positives)) / len(queries)


# ---------------------------------------------------------------------------------------------------------------------
# CycleGAN, the baseline


class CycleTranslation:
    """Zhu et al. 2017: two generators G: X -> Y and G_back: Y -> X, two discriminators, and an L1 cycle loss."""

    def __init__(self, args, device):
        self.args = args
        options = dict(base_channels=args.base_channels, antialias=args.antialias)
        self.G, self.G_back = (_on(device, models.ResnetGenerator(**options)) for _ in range(2))
        self.D_y, self.D_x = (_on(device, models.PatchDiscriminator(**options)) for _ in range(2))
        self.opt_G = optimization.adam([*self.G.parameters(), *self.G_back.parameters()], lr=args.lr, betas=BETAS)
        self.opt_D = optimization.adam([*self.D_y.parameters(), *self.D_x.parameters()], lr=args.lr, betas=BETAS)
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
                "cycle": l1(G_back(fake_y), x) + l1(G(fake_x), y),
            }
            loss_G = losses["G_gan"] + LAMBDA_CYCLE * losses["cycle"]
            if args.identity_weight > 0:
                losses["identity"] = l1(G(y), y) + l1(G_back(x), x)
                loss_G = loss_G + args.identity_weight * losses["identity"]
        optimization.backward_and_step(self.opt_G, loss_G)

        for discriminator in (D_y, D_x):
            discriminator.requires_grad_(True)
        with autocast:
            loss_D = discriminator_loss(D_y, y, self.pool_y.exchange(fake_y.detach()), args.gan_loss)
            loss_D = loss_D + discriminator_loss(D_x, x, self.pool_x.exchange(fake_x.detach()), args.gan_loss)
        optimization.backward_and_step(self.opt_D, loss_D)
        return fake_y, {"D": loss_D} | losses


def l1(a, b):
    return (models.promoted(a) - models.promoted(b)).abs().mean()


class ImagePool(training.OfProcess):
    """The last translations, half of which D is shown instead of the newest (Shrivastava et al. 2017; Zhu et al. 2017)."""

    def __init__(self, size, device=None):
        self.size, self.images = size, None
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # of images stored; all decisions stay on the device

    def exchange(self, images):
        """(B, 3, H, W) -> as many; while the pool fills, the same; then each with probability 1/2 against a stored one."""
        if self.images is None:
            self.images = images.new_zeros((self.size, *images.shape[1:]))
        shown = torch.empty_like(images)  # in their memory format
        for new, place in zip(images, shown, strict=True):
            is_full = self.count == self.size
            draw, coin = torch.randint(self.size, (1,), device=images.device), torch.rand((), device=images.device)
            index = torch.where(is_full, draw, self.count)
            stored = self.images.index_select(0, index)[0]
            is_exchanged = is_full & (coin < 0.5)
            place.copy_(torch.where(is_exchanged, stored, new))
            self.images.index_copy_(0, index, torch.where(is_exchanged | ~is_full, new, stored)[None])
            self.count += ~is_full
        return shown

    def state_dict(self):
        return {"images": [] if self.images is None else self.images[: int(self.count)]}

    def load_state_dict(self, state):
        images = list(state["images"])
        if len(images) > self.size or any(image.ndim != 3 for image in images):
            raise ValueError(f"no pool of {self.size} images")
        if images:
            self.images = images[0].new_zeros((self.size, *images[0].shape))
            self.images[: len(images)] = torch.stack(images)
        self.count.fill_(len(images))


# ---------------------------------------------------------------------------------------------------------------------


def _on(device, network):
    return network.to(device, memory_format=runtime.translator_layout(device))


def main():
    args = parse_args()
    run = training.Run(args)
    exclude = data.read_names(args.exclude) if args.exclude else ()
    source = data.list_frames(args.source, labelled=False, exclude=exclude)
    target = data.list_frames(args.target, args.target_splits, labelled=False, exclude=exclude)
    if run.is_finished(source=source, target=target):
        return
    for frames in (source, target):
        data.check_frames(frames, args.width, args.crop_size)
    torch.manual_seed(args.seed)
    translation = (CycleTranslation if args.method == "cyclegan" else ContrastiveTranslation)(args, run.device)
    run.restore(**translation.state)

    dataset = StackDataset(
        data.Crops(source, args.width, args.crop_size, run.samples, args.seed, stream=0, cache=args.cache),
        data.Crops(target, args.width, args.crop_size, run.samples, args.seed, stream=1, cache=args.cache),
    )
    layout, autocast = runtime.translator_layout(run.device), runtime.autocast(run.device, args.precision)
    step = optimization.GraphedStep(lambda x, y: translation.step(x, y, autocast), run.device)
    for iteration, batch in run.iterations(dataset):
        lr = optimization.constant_then_linear(iteration, args.iterations, args.lr)
        for optimizer in (translation.opt_G, translation.opt_D):
            optimization.set_learning_rate(optimizer, lr)
        x, y = (data.to_signed(images).contiguous(memory_format=layout) for images in batch)
        fake, losses = step(x, y)
        run.log(losses, lr=lr)
        if run.saves_next:
            run.save_grid(*((images + 1) / 2 for images in (x, fake, y)))
    run.finish(models.network_state(translation.G), method=args.method)


if __name__ == "__main__":
    runtime.run_script(main)
