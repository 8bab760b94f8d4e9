"""PyTorch DistributedDataParallel over gloo, one process for each worker."""

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
import worker
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Net(nn.Module):
    """The model; takes images [n, 1, 28, 28]."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv1 = nn.Conv2d(32, 64, 3, padding=1)
        self.dense2 = nn.Linear(3136, 128)
        self.dense3 = nn.Linear(128, 10)

    def forward(self, x):
        """Return the logits [n, 10]."""
        x = F.max_pool2d(F.relu(self.conv0(x)), 2)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.dense3(F.relu(self.dense2(torch.flatten(x, 1))))


def torch_layout(name, value):
    """Return one of txcore's arrays as PyTorch lays it out."""
    if name.startswith("conv") and name.endswith("/w"):
        value = value.transpose(3, 2, 0, 1)  # HWIO to OIHW
    elif name == "dense2/w":  # its rows are the pixels in NHWC order
        value = value.reshape(7, 7, 64, 128).transpose(3, 2, 0, 1).reshape(128, 3136)
    elif name.endswith("/w"):
        value = value.T
    return torch.from_numpy(np.ascontiguousarray(value))


def state_dict(weights):
    """Return txcore's arrays under PyTorch's names."""
    names = {"w": "weight", "b": "bias"}
    return {
        f"{key.split('/')[0]}.{names[key.split('/')[1]]}": torch_layout(key, value)
        for key, value in weights.items()
    }


def build_model(weights, form):
    """Return the model, wrapped by DDP in the form asked for."""
    model = Net()
    model.load_state_dict(state_dict(weights))
    if form == "usual":
        return DistributedDataParallel(model)
    model = model.to(memory_format=torch.channels_last)
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return torch.compile(model) if form == "compiled" else model


def image_tensor(images, form):
    """Return images [n, 28, 28, 1] as [n, 1, 28, 28] in the form's layout."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    layout = torch.contiguous_format if form == "usual" else torch.channels_last
    return tensor.contiguous(memory_format=layout)


def autocast(precision):
    """Return a context in which products and convolutions are of a precision."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def main() -> None:
    """Serve steps."""
    args = worker.parse_arguments()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{args.ports[0]}",
        rank=args.rank,
        world_size=args.processes,
    )
    model = build_model(worker.load_weights(args.weights), args.form)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=worker.LEARNING_RATE, momentum=worker.MOMENTUM
    )

    def step(batch):
        images, labels = batch
        optimizer.zero_grad(set_to_none=True)
        with autocast(args.precision):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    batches = [
        (image_tensor(images, args.form), torch.from_numpy(labels.astype(np.int64)))
        for images, labels in worker.load_batches(args)
    ]
    worker.serve_requests(args, step, batches, {"torch": torch.__version__})


if __name__ == "__main__":
    main()
