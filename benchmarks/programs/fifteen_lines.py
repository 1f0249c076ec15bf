"""The shortest DDP script there is, up to its first optimizer step: torchrun fifteen_lines.py FOLDER_OF_MNIST."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader, DistributedSampler

# the fifteen lines
gpu = torch.cuda.is_available()
torch.distributed.init_process_group("nccl" if gpu else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
convolutions = [torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU()]
head = [torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(4608, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)]
network = torch.nn.Sequential(*convolutions, *head).to(device)
model = torch.nn.parallel.DistributedDataParallel(network, device_ids=[device] if gpu else None)
mnist = torchvision.datasets.MNIST(sys.argv[1], transform=torchvision.transforms.ToTensor())
loader = DataLoader(mnist, 32, sampler=DistributedSampler(mnist))
optimizer = torch.optim.Adadelta(model.parameters(), 1.0)
images, labels = next(iter(loader))
loss = torch.nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
loss.backward()  # type: ignore[no-untyped-call]
optimizer.step()
loss.item()

# what the benchmark reads: the age of this process, and the time of day
start_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
age = time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
if torch.distributed.get_rank() == 0:
    print("RESULT " + json.dumps({"seconds": age, "unix_time": time.time()}), flush=True)
torch.distributed.destroy_process_group()
