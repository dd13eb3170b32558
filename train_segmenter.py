"""Stage 3 of CLADA: train the task model, a U-Net over EfficientNet, on one labelled data set.

    python train_segmenter.py --data gta5 --out runs/source_only                       # Source Only
    python train_segmenter.py --data translated/fastcut_l5 --out runs/fastcut_l5       # one per translated set
    python train_segmenter.py --data cityscapes --split train --out runs/oracle        # Oracle

The paper's defaults: EfficientNet-B3 from ImageNet, batch 8, 120k iterations, learning rate 2e-4, lower for the last third,
encoder frozen for the first third. Ours, because the paper is silent or unreadable there: Adam, pixel-wise cross entropy that
ignores void, width 1024, crops of 512x512, flips, and the lower rate of 1e-5. The same command resumes an unfinished run.
"""

from functools import partial

import torch

import data
import files
import models
import runtime
import training
from check_data import check_frames
from losses import segmentation_loss
from optimization import GraphedStep, adam, backward_and_step, set_learning_rate, synchronise_batchnorm


def parse_args(words=None):
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--data", type=runtime.real_path, required=True, metavar="DIR", help="labelled data set, GTA5 or Cityscapes layout")
    add("--split", default="train", help="split to use, in the Cityscapes layout (default train)")
    add("--encoder", default="efficientnet-b3", help="efficientnet-b0 to -b7 (default efficientnet-b3)")
    add("--encoder-weights", default="imagenet", metavar="{imagenet,none,FILE}", help="initial weights (default imagenet)")
    text = "steps with a frozen encoder (default: a third of --iterations; 0 with --encoder-weights none)"
    add("--freeze-iterations", type=runtime.count, help=text)
    training.add_arguments(parser, iterations=120_000, batch_size=8, crop_size="512", lr=2e-4)
    args = parser.parse_args(words)
    if args.freeze_iterations is None:
        args.freeze_iterations = 0 if args.encoder_weights == "none" else args.iterations // 3
    return args


def learning_rate(iteration, iterations, base):
    """`base`, then a twentieth of it for the last third, 40k of 120k (the paper; the second rate is unreadable there)."""
    return base if 3 * iteration < 2 * iterations else base / 20


def training_step(segmenter, optimizer, images, labels, autocast):
    """One step. images: (B, 3, H, W) in [0, 1]; labels: (B, H, W) train ids -> (logits (B, C, H, W), loss)."""
    with autocast:
        logits = segmenter(images)
    loss = segmentation_loss(logits, labels)
    backward_and_step(optimizer, loss)
    return logits.detach(), loss.detach()  # no part of this step's graph stays when the next one is recorded


def main():
    args = parse_args()
    weights = None if args.encoder_weights == "none" else args.encoder_weights
    args.content_of_encoder_weights = files.digest(weights) if weights not in (None, "imagenet") else args.encoder_weights
    run = training.Run(args)
    frames = data.list_frames(args.data, args.split, exclude=data.read_names(args.exclude))
    if run.is_finished(data=frames):
        return
    check_frames(frames, args.width, args.crop_size)
    torch.manual_seed(args.seed)
    weights = None if run.checkpoint.is_file() else weights  # it has the network
    segmenter = synchronise_batchnorm(models.UNet(len(frames.classes.names), args.encoder, weights), run.device)
    run.end_check()  # only now, so that --check also loads the encoder's weights
    segmenter.to(run.device, memory_format=torch.channels_last).train()
    optimizer = adam(segmenter.parameters(), lr=args.lr)
    content = partial(models.network_state, segmenter, args.width, frames.classes.rows)
    run.restore(content, segmenter=segmenter, optimizer=optimizer)
    autocast = runtime.autocast(run.device, args.precision)

    def step(images, labels):
        return training_step(segmenter, optimizer, images, labels, autocast)

    def grid(images, logits, labels):
        prediction, label = (data.colourise(ids.cpu(), frames.classes) / 255 for ids in (logits.argmax(1), labels))
        return {"image": images, "prediction": prediction, "label": label}

    dataset = data.Crops(frames, args.width, args.crop_size, run.sample_count, args.seed, labelled=True, cache=args.cache)
    graphed_step = GraphedStep(step, run.device)
    for iteration, (images, labels) in run.iterations(dataset):
        is_frozen = iteration < args.freeze_iterations
        if segmenter.encoder_frozen != is_frozen:
            segmenter.freeze_encoder(is_frozen)
            graphed_step = GraphedStep(step, run.device)
        lr = learning_rate(iteration, args.iterations, args.lr)
        set_learning_rate(optimizer, lr)
        images = data.to_unit(images).contiguous(memory_format=torch.channels_last)
        logits, loss = graphed_step(images, labels)
        run.log({"loss": loss}, grid=partial(grid, images, logits, labels), lr=lr)
    run.finish()


if __name__ == "__main__":
    runtime.run_script(main)
