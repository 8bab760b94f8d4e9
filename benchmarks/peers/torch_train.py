"""Train on MNIST by PyTorch DDP over gloo, telling the test accuracy after each epoch.

Two optimizers, each with its recipe. "adadelta": the defaults of PyTorch's own MNIST example
(pytorch/examples, mnist/main.py): Adadelta at 1.0, times 0.7 after each epoch, batch 64. "sgd":
txcore's, momentum 0.9, the rate rising linearly and falling to 0 by half a cosine, batch 64 in each
worker.
"""

import argparse
import json
import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data.dataset import load
from torch.nn.parallel import DistributedDataParallel
from torch_worker import Net, image_tensor

BATCH, EVAL_BATCH = 64, 500  # in each worker


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--optimizer", choices=["adadelta", "sgd"], required=True)
    add("--learning-rate", type=float, help="of sgd, after the warm-up")
    add("--warmup", type=int, help="steps of sgd")
    add("--label-smoothing", type=float, default=0.0)
    add("--epochs", type=int, required=True)
    add("--seed", type=int, required=True)
    add("--rank", type=int, required=True)
    add("--processes", type=int, required=True)
    add("--port", type=int, required=True)
    return parser.parse_args()


def make_optimizer(args, model, steps_per_epoch):
    """Return the optimizer and its schedule, which is told of every step."""
    if args.optimizer == "adadelta":
        optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
        decay = torch.optim.lr_scheduler.StepLR(optimizer, step_size=steps_per_epoch, gamma=0.7)
        return optimizer, decay
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=0.9)
    total = args.epochs * steps_per_epoch

    def share(step):
        done = min(1, max(0, (step - args.warmup) / (total - args.warmup)))
        return min(1, (step + 1) / args.warmup) * (1 + math.cos(math.pi * done)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def epoch_rows(count, seed, epoch, rank, processes):
    """Return this worker's batches of rows: a shuffle that all workers share equally."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    own = torch.from_numpy(order[rank : count - count % processes : processes])
    return own.split(BATCH)


def measure_accuracy(model, images, labels, rank, processes):
    """Return the share of the whole test set that is right; each worker tries its part."""
    right = torch.zeros((), dtype=torch.int64)
    with torch.inference_mode():
        for x, y in zip(
            images[rank::processes].split(EVAL_BATCH),
            labels[rank::processes].split(EVAL_BATCH),
            strict=True,
        ):
            right += (model(x).argmax(1) == y).sum()
    dist.all_reduce(right)
    return right.item() / len(labels)


def main():
    """Train, and print a line of JSON for each epoch."""
    args = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rank, processes = args.rank, args.processes
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{args.port}",
        rank=rank,
        world_size=processes,
    )
    data = load("mnist", rank=rank, barrier=lambda name: dist.barrier())
    images, test_images = (image_tensor(x, "best") for x in (data.train_images, data.test_images))
    labels, test_labels = (
        torch.from_numpy(x.astype(np.int64)) for x in (data.train_labels, data.test_labels)
    )
    net = Net().to(memory_format=torch.channels_last)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    steps_per_epoch = -(-(len(labels) // processes) // BATCH)
    optimizer, schedule = make_optimizer(args, model, steps_per_epoch)
    for epoch in range(args.epochs):
        for rows in epoch_rows(len(labels), args.seed, epoch, rank, processes):
            optimizer.zero_grad(set_to_none=True)
            logits = model(images[rows])
            smoothing = args.label_smoothing
            F.cross_entropy(logits, labels[rows], label_smoothing=smoothing).backward()
            optimizer.step()
            schedule.step()
        reached = measure_accuracy(net, test_images, test_labels, rank, processes)
        if rank == 0:
            print(json.dumps({"epoch": epoch + 1, "test_accuracy": reached}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
