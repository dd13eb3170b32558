"""Stage 4 of CLADA: fine-tune the task model F so that a discriminator cannot tell the domains by F's features.

    python adapt_features.py --source translated/fastcut_l5 --target cityscapes --segmenter runs/fastcut_l5 --out runs/clada

D_feat sees an intermediate layer of F (--layer) and learns to tell translated source from target; F learns to make target
frames pass for source, while its supervised loss on translated source goes on. Two optimisers, and the gate of CyCADA
(Hoffman et al. 2018): the adversarial term reaches F only while D_feat's accuracy over its last 100 batches is above 60%.
Labels of the target are not read. --adversarial-weight 0 is the control: the same fine-tuning, target frames passing
through F and its BatchNorm statistics included, but for the adversary's gradient. F's learning rate is constant for the first
half, then falls linearly to 0; D_feat's stays. CyCADA holds back F's whole step where the gate is shut; here the supervised
loss goes on (ours, as are all of this stage's rates, the fall of F's, its layer and its iterations).
An unfinished run is resumed by the same command.
"""

import torch
from torch.utils.data import StackDataset

import data
import files
import models
import optimization
import runtime
import training
from losses import gan_loss, segmentation_loss

GATE_WINDOW = 100  # batches, Hoffman et al. 2018


def parse_args(words=None):
    parser = runtime.parser(__doc__.split("\n\n")[0], __doc__)
    parser.add_argument("--source", type=runtime.real_path, required=True, metavar="DIR", help="translated, labelled data set")
    parser.add_argument("--target", type=runtime.real_path, required=True, metavar="DIR", help="target data set; labels unread")
    parser.add_argument("--target-splits", default="train", help="Cityscapes splits, e.g. train,train_extra (default train)")
    parser.add_argument(
        "--segmenter",
        type=runtime.run_path,
        required=True,
        metavar="RUN",
        help="a finished run of train_segmenter.py on --source",
    )
    layers = [f"{part}{n}" for part in ("encoder", "decoder") for n in range(1, 6)]
    parser.add_argument("--layer", choices=layers, default="decoder3", help="of F (default decoder3, at stride 4)")
    parser.add_argument(
        "--adversarial-weight", type=runtime.non_negative, default=0.1, help="of the adversarial term (default 0.1)"
    )
    parser.add_argument(
        "--discriminator-lr",
        type=runtime.positive,
        default=1e-4,
        help="Adam's learning rate for D_feat (default 1e-4)",
    )
    parser.add_argument(
        "--gate",
        type=runtime.fraction,
        default=0.6,
        help="accuracy of D_feat above which F is trained on it (default 0.6)",
    )
    runtime.add_training_arguments(parser, iterations=20_000, batch_size=4, crop_size="512", lr=1e-5)
    return parser.parse_args(words)


class Gate:
    """Is D_feat good enough for its gradient to mean something? Its mean accuracy over the last batches says so.

    All of it stays on the device: to ask costs no synchronisation.
    """

    def __init__(self, threshold, device=None):
        self.threshold = threshold
        self.accuracies = torch.zeros(GATE_WINDOW, device=device)  # a ring
        self.places = torch.arange(GATE_WINDOW, device=device)
        self.opened, self.asked = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

    def opens(self, accuracy):
        """Take in the accuracy of the newest batch, a scalar in [0, 1] -> 1.0 if the adversarial term may reach F, or 0.0."""
        is_here = self.places == self.asked % GATE_WINDOW
        self.accuracies.copy_(torch.where(is_here, accuracy, self.accuracies))  # masked_fill_ would ask for the value
        self.asked += 1
        is_open = self.accuracies.sum() / self.asked.clamp(max=GATE_WINDOW) > self.threshold
        self.opened += is_open
        return is_open.float()

    def state_dict(self):
        return {"accuracies": self.accuracies, "opened": self.opened, "asked": self.asked}

    def load_state_dict(self, state):
        self.accuracies.copy_(state["accuracies"])
        self.opened.copy_(state["opened"])
        self.asked.fill_(int(state["asked"]))


def training_step(F, D, opt_F, opt_D, gate, batch, layer, weight, autocast):
    """One alternation of D_feat and F. batch: source images and labels, target images -> losses by name."""
    source, labels, target = batch
    with autocast:
        logits, features_source = F(source, return_features=True)
        _, features_target = F(target, return_features=True)
        features_source, features_target = features_source[layer], features_target[layer]

        # D_feat: equation 1 on features, the source being what is real to it.
        is_source, is_target = D(features_source.detach()), D(features_target.detach())
        loss_D = (gan_loss(is_source, True, "vanilla") + gan_loss(is_target, False, "vanilla")) / 2
    accuracy = ((is_source > 0).float().mean() + (is_target <= 0).float().mean()) / 2
    optimization.backward_and_step(opt_D, loss_D)

    # F: supervised on translated source; where the gate is open, also to make the target's features look like source.
    task = loss_F = segmentation_loss(logits, labels)
    is_open = gate.opens(runtime.all_reduce_mean_(accuracy.clone()))
    D.requires_grad_(False)
    if weight > 0:
        with autocast:
            loss_F = loss_F + weight * is_open * gan_loss(D(features_target), True, "vanilla")
    optimization.backward_and_step(opt_F, loss_F)
    D.requires_grad_(True)
    return {"task": task, "D": loss_D, "D_accuracy": accuracy, "gate_open": is_open}


def main():
    args = parse_args()
    run = training.Run(args)
    exclude = data.read_names(args.exclude) if args.exclude else ()
    target = data.list_frames(args.target, args.target_splits, labelled=False, exclude=exclude)
    data.check_frames(target, args.width, args.crop_size)
    if args.check:
        run.restore()  # ends here: what stages 2 and 3 leave need not be there yet
    source = data.list_frames(args.source, exclude=exclude)
    weights = files.finished(args.segmenter, "--segmenter")
    args.weights_of_segmenter = files.digest(weights)
    if run.is_finished(source=source, target=target):
        return
    data.check_frames(source, args.width, args.crop_size)
    torch.manual_seed(args.seed)
    segmenter = optimization.synchronise_batchnorm(models.load_network(weights, models.UNet, run.device), run.device)
    segmenter.to(memory_format=torch.channels_last).train()
    discriminator = models.FeatureDiscriminator(segmenter.feature_channels[args.layer]).to(run.device)
    opt_F = optimization.adam(segmenter.parameters(), lr=args.lr)
    opt_D = optimization.adam(discriminator.parameters(), lr=args.discriminator_lr)
    gate = Gate(args.gate, run.device)
    parts = dict(segmenter=segmenter, discriminator=discriminator, opt_F=opt_F, opt_D=opt_D, gate=gate)
    run.restore(**parts)

    dataset = StackDataset(
        data.Crops(source, args.width, args.crop_size, run.samples, args.seed, stream=0, labelled=True, cache=args.cache),
        data.Crops(target, args.width, args.crop_size, run.samples, args.seed, stream=1, cache=args.cache),
    )
    networks, rest = (segmenter, discriminator, opt_F, opt_D, gate), (args.layer, args.adversarial_weight)
    autocast = runtime.autocast(run.device, args.precision)
    step = optimization.GraphedStep(lambda *batch: training_step(*networks, batch, *rest, autocast), run.device)
    for iteration, ((x, labels), y) in run.iterations(dataset):
        lr = optimization.constant_then_linear(iteration, args.iterations, args.lr)
        optimization.set_learning_rate(opt_F, lr)
        x, y = (data.to_unit(images).contiguous(memory_format=torch.channels_last) for images in (x, y))
        run.log(step(x, labels, y), lr=lr)
    opened, asked = int(gate.opened), int(gate.asked)
    if args.adversarial_weight > 0:
        print(f"{args.out}: the gate let the adversary through in {opened} of {asked} steps")
        if opened == 0:
            print(f"{args.out}: D_feat never passed --gate {args.gate}: this is fine-tuning without an adversary")
    run.finish(models.network_state(segmenter), gate_opened=opened, gate_asked=asked)


if __name__ == "__main__":
    runtime.run_script(main)
