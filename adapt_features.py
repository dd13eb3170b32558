"""Stage 4 of CLADA: fine-tune the task model so that a discriminator cannot tell the domains apart by its features.

    python adapt_features.py --source translated/fastcut_l5 --target cityscapes --segmenter runs/fastcut_l5 --out runs/clada

D_feat sees an intermediate layer of the segmenter (--layer) and learns to tell translated source from target, at first alone
(--head-start). Then the segmenter learns to make target features pass for source features, and keeps training on the labels
of the translated source. The gate of CyCADA (Hoffman et al. 2018) lets the adversarial term reach the segmenter only while
D_feat's accuracy over its last 100 batches is above 60%. The target's labels are not read.

Two controls separate the causes of the stage's gain. --adversarial-weight 0: target frames pass through the segmenter and its
BatchNorm statistics, but the adversary's gradient does not reach it. --no-target: only the additional steps, without target
frames.

The segmenter's learning rate is constant for the first half of its steps, then falls linearly to 0; D_feat's is constant.
CyCADA skips the segmenter's whole step while the gate is shut; here the supervised loss continues (ours, as are this stage's
layer, Adam, learning rates, crop, batch and iterations). CyCADA's weight is 0.1, the paper's 0.1 or less; 0.01 was chosen
on two pairs (docs/results.md). The same command resumes an unfinished run.
"""

import logging
from functools import partial

import torch
from torch.utils.data import StackDataset

import data
import files
import models
import runtime
import training
from check_data import check_frames
from losses import discriminator_loss, gan_loss, segmentation_loss
from optimization import GraphedStep, adam, backward_and_step, constant_then_linear, set_learning_rate, synchronise_batchnorm

GATE_WINDOW = 100  # batches, Hoffman et al. 2018
SHUT = "the adversary hardly took part; a longer --head-start or a higher --discriminator-lr helps D_feat learn"
log = logging.getLogger("adapt_features")
LAYERS = [f"{part}{n}" for part in ("encoder", "decoder") for n in range(1, 6)]


def parse_args(words=None):
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    target = "target data set, or any folder of images; labels are not read"
    training.add_domain_arguments(parser, source="translated, labelled data set", target=target)
    add("--segmenter", type=runtime.path, required=True, metavar="RUN", help="finished run of train_segmenter.py on --source")
    add("--layer", choices=LAYERS, default="decoder3", help="input of D_feat (default decoder3, stride 4)")
    add("--adversarial-weight", type=runtime.non_negative, default=0.01, help="weight of the adversarial loss (default 0.01)")
    add("--discriminator-lr", type=runtime.positive, default=1e-4, help="Adam's learning rate for D_feat (default 1e-4)")
    add("--gate", type=runtime.fraction, default=0.6, help="D_feat accuracy that opens the gate (default 0.6)")
    text = "first steps, which train D_feat alone; part of --iterations (default: a tenth of them)"
    add("--head-start", type=runtime.count, help=text)
    add("--no-target", action="store_true", help="control: no target frames reach the segmenter, and there is no adversary")
    training.add_arguments(parser, iterations=20_000, batch_size=4, crop_size="512", lr=1e-5)
    args = parser.parse_args(words)
    if args.head_start is None:
        args.head_start = args.iterations // 10
    if args.head_start >= args.iterations:
        parser.error(f"--head-start {args.head_start}: must be below --iterations, {args.iterations}")
    return args


class Gate:
    """CyCADA's gate: open while D_feat's mean accuracy over the last 100 batches exceeds the threshold.

    All of its state stays on the device, so that no step waits for it and a CUDA graph can update it.
    """

    def __init__(self, threshold, device=None):
        self.threshold = threshold
        self.accuracies = torch.zeros(GATE_WINDOW, device=device)  # a ring buffer
        self.positions = torch.arange(GATE_WINDOW, device=device)
        self.batches, self.open_steps = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

    def mean_accuracy(self):
        return self.accuracies.sum() / self.batches.clamp(1, GATE_WINDOW)

    def update(self, accuracy, counts=True):
        """Add the accuracy of the newest batch, a scalar tensor in [0, 1] -> 1.0 if the gate is open, else 0.0.

        counts: count the step in `open_steps` if the gate is open.
        """
        is_next = self.positions == self.batches % GATE_WINDOW
        self.accuracies.copy_(torch.where(is_next, accuracy, self.accuracies))  # masked_fill_ would wait for the device
        self.batches += 1
        is_open = self.mean_accuracy() > self.threshold
        self.open_steps += is_open & counts
        return is_open.float()

    def state_dict(self):
        return {"accuracies": self.accuracies, "batches": self.batches, "open_steps": self.open_steps}

    def load_state_dict(self, state):
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def training_step(
    segmenter, discriminator, opt_segmenter, opt_discriminator, gate, batch, layer, weight, autocast, head_start=False
):
    """One step of D_feat and, after its head start, one of the segmenter -> losses by name.

    batch: source images (B, 3, H, W) in [0, 1], their train ids (B, H, W), and target images, which are None with --no-target.
    """
    source, labels, target = batch
    with autocast, torch.set_grad_enabled(not head_start):
        logits, features_source = segmenter(source, return_features=True)
        if target is not None:
            _, features_target = segmenter(target, return_features=True)
            features_source, features_target = features_source[layer], features_target[layer]
    loss = segmentation_loss(logits, labels)
    losses = {"task": loss}

    if target is not None:  # D_feat: equation 1 on features; source features are "real"
        with autocast:
            real, fake = discriminator(features_source.detach()), discriminator(features_target.detach())
            loss_D = discriminator_loss(real, fake, "vanilla")
        accuracy = ((real > 0).float().mean() + (fake <= 0).float().mean()) / 2
        backward_and_step(opt_discriminator, loss_D)
        is_open = gate.update(runtime.all_reduce_mean_(accuracy.clone()), counts=not head_start)
        losses |= {"D": loss_D, "D_accuracy": accuracy, "gate_open": is_open}

    if head_start:
        return losses
    # Segmenter: labels of the translated source and, while the gate is open, target features that pass for source.
    discriminator.requires_grad_(False)
    if target is not None and weight > 0:
        with autocast:
            loss = loss + weight * is_open * gan_loss(discriminator(features_target), True, "vanilla")
    backward_and_step(opt_segmenter, loss)
    discriminator.requires_grad_(True)
    return losses


def build(args, weights, classes, device):
    """The segmenter, D_feat, their optimizers and the gate, by their names in a checkpoint."""
    torch.manual_seed(args.seed)
    segmenter = models.load_network(weights, models.UNet, device)
    classes.check_same(data.Classes(segmenter.classes or data.CITYSCAPES.rows), "--source and --segmenter")
    segmenter = synchronise_batchnorm(segmenter, device).to(memory_format=torch.channels_last).train()
    discriminator = models.FeatureDiscriminator(segmenter.feature_channels[args.layer]).to(device)
    return {
        "segmenter": segmenter,
        "discriminator": discriminator,
        "opt_segmenter": adam(segmenter.parameters(), lr=args.lr),
        "opt_discriminator": adam(discriminator.parameters(), lr=args.discriminator_lr),
        "gate": Gate(args.gate, device),
    }


def summarise(args, gate):
    """Report how often the gate was open -> entries of summary.json."""
    if args.no_target:
        return {}
    steps, accuracy = args.iterations - args.head_start, float(gate.mean_accuracy())
    if args.adversarial_weight > 0:
        accuracies = f"D_feat's accuracy is {accuracy:.2f} at the end, --gate {args.gate}"
        print(f"{args.out}: the gate was open in {int(gate.open_steps)} of {steps} steps; {accuracies}")
        if gate.open_steps < steps / 10:
            log.warning("%s: %s", args.out, SHUT)
    return {"gate_open_steps": int(gate.open_steps), "gate_steps": steps, "D_accuracy": accuracy}


def main():
    args = parse_args()
    run = training.Run(args)
    exclude = data.read_names(args.exclude)
    target = data.list_frames(args.target, args.target_splits, labelled=False, exclude=exclude)
    check_frames(target, args.width, args.crop_size)
    run.end_check()  # before --source and --segmenter: stages 2 and 3 may not have run yet
    source = data.list_frames(args.source, exclude=exclude)
    weights = files.finished(args.segmenter, "--segmenter")
    args.weights_of_segmenter = files.digest(weights)
    if run.is_finished(source=source, target=target):
        return
    check_frames(source, args.width, args.crop_size)
    parts = build(args, weights, source.classes, run.device)
    run.restore(partial(models.network_state, parts["segmenter"], args.width, source.classes.rows), **parts)

    crops = (args.width, args.crop_size, run.sample_count, args.seed)
    labelled = data.Crops(source, *crops, stream=0, labelled=True, cache=args.cache)
    dataset = StackDataset(labelled, data.Crops(target, *crops, stream=1, cache=args.cache))
    autocast = runtime.autocast(run.device, args.precision)

    def step(x, labels, y, head_start=False):
        batch = x, labels, None if args.no_target else y
        return training_step(*parts.values(), batch, args.layer, args.adversarial_weight, autocast, head_start)

    graphed_step = None
    for iteration, ((x, labels), y) in run.iterations(dataset):
        done = iteration - args.head_start  # steps of the segmenter
        lr = constant_then_linear(max(0, done), args.iterations - args.head_start, args.lr)
        set_learning_rate(parts["opt_segmenter"], lr)
        x, y = (data.to_unit(images).contiguous(memory_format=torch.channels_last) for images in (x, y))
        if graphed_step is None or done == 0:  # the head start is a graph of its own
            graphed_step = GraphedStep(partial(step, head_start=done < 0), run.device)
        run.log(graphed_step(x, labels, y), lr=lr)
    run.finish(**summarise(args, parts["gate"]))


if __name__ == "__main__":
    runtime.run_script(main)
