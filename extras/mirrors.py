"""
Records of a run in other places too: Weights & Biases (--wandb=PROJECT), TensorBoard
(--tensorboard=true). Needs the packages of these names.
"""

import hashlib
import importlib
import os

from common.errors import UserError


def check(wandb_project, tensorboard):
    """UserError where a package that is asked for is missing"""
    if wandb_project:
        extra("wandb", "wandb")
    if tensorboard:
        extra("tensorboard", "tensorboard")


def open_mirrors(out_dir, config, wandb_project, tensorboard, start_step):
    """-> functions of (step, dict of numbers) that send a record elsewhere too"""
    mirrors = []
    if tensorboard:
        writer = extra("torch.utils.tensorboard", "tensorboard").SummaryWriter(
            os.path.join(out_dir, "tensorboard"), purge_step=start_step or None
        )

        def to_tensorboard(step, numbers):
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            # nothing is buffered when a kill comes
            writer.flush()

        mirrors.append(to_tensorboard)
    if wandb_project:
        name = os.path.abspath(out_dir)
        run = extra("wandb", "wandb").init(
            project=wandb_project,
            name=os.path.basename(name),
            dir=out_dir,
            config=config,
            resume="allow",
            # a resumed run goes on there too
            id=hashlib.sha256(name.encode()).hexdigest()[:16],
        )
        mirrors.append(lambda step, numbers: run.log(numbers, step=step))
    return mirrors


def extra(module, package):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"--{package}: it is not installed; pip install {package}, or this package with its "
            f'extra "{package}"'
        ) from None
