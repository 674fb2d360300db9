"""Lightning: a callback that attaches the routers of a LightningModule, logs their metrics and resumes them.

An example stands in docs/integrations.md.
"""

from typing import Any, cast

import torch

from kmeans_route.checks import check_positive_int
from kmeans_route.integrations import require
from kmeans_route.routing.base import StatefulRouter
from kmeans_route.training.attach import Attachment, attach
from kmeans_route.training.telemetry import MAX_KEYS

SUPPORTED = ">=2.4,<3"
TRIED = ("2.6.6",)
require("lightning", SUPPORTED)

from lightning.pytorch import Callback  # noqa: E402


class KMeansRouting(Callback):
    """Attach the routers of the LightningModule as training starts: one commit per optimizer step.

    What counts: the forward of the LightningModule, or of one of its direct children (`self.model(x)` in
    training_step), entered in training mode with gradients. The state of the routers is in the checkpoint's own
    state dict, so a resumed run has the bits of one that never stopped. With `wire` or `shard` what rounding has left
    out is each rank's own and not in the checkpoint: a resume goes on from the rounded values.

    Args:
        process_group: the ranks that see different tokens; None for the strategy's data-parallel ones: those of its
            "data_parallel" mesh dimension where it has one (ModelParallelStrategy), else all.
        optimizer: which of several optimizers of the module commits, by its place; None where there is one.
        log_metrics: send the routers' metrics to the loggers, and to `trainer.callback_metrics`, every
            `log_every_n_steps` optimizer steps.
        max_keys: at most that many scalars, see `Attachment.metrics`; None for no limit.
        every_n_steps, wire, shard: as in `kmeans_route.attach`.

    Raises:
        ValueError: as training starts, for a module without routers, or with several optimizers and none named.
    """

    def __init__(
        self,
        process_group: Any = None,
        *,
        optimizer: int | None = None,
        log_metrics: bool = True,
        max_keys: int | None = MAX_KEYS,
        every_n_steps: int = 1,
        wire: str = "fp32",
        shard: bool = False,
    ) -> None:
        super().__init__()
        check_positive_int("every_n_steps", every_n_steps)
        self.process_group, self.optimizer, self.log_metrics = process_group, optimizer, log_metrics
        self.max_keys = max_keys
        self.options: dict[str, Any] = {"every_n_steps": every_n_steps, "wire": wire, "shard": shard}
        self.attachment: Attachment | None = None
        self._steps, self._logged_at = 0, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: the model is on its device, the checkpoint is loaded, the optimizers are there."""
        group = _data_parallel_group(trainer.strategy) if self.process_group is None else self.process_group
        self.attachment = attach(pl_module, self._optimizer_of(trainer), group, **self.options)
        for child in pl_module.children():
            if any(isinstance(module, StatefulRouter) for module in child.modules()):
                self.attachment.watch(child)
        self.attachment.load_state_dict({**self.attachment.state_dict(), "steps": self._steps})
        self._logged_at = trainer.global_step

    def _optimizer_of(self, trainer: Any) -> torch.optim.Optimizer:
        optimizers = trainer.optimizers
        if self.optimizer is None and len(optimizers) != 1:
            raise ValueError(
                f"optimizer must name one of the {len(optimizers)} optimizers of the module, got None: pass "
                "KMeansRouting(optimizer=0), the one whose steps are to commit"
            )
        chosen = self.optimizer or 0
        if not 0 <= chosen < len(optimizers):
            raise ValueError(f"optimizer must be in [0, {len(optimizers) - 1}], got {chosen}: the module has no other")
        return cast(torch.optim.Optimizer, optimizers[chosen])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log after every `log_every_n_steps`-th optimizer step; reading metrics back waits for the device."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if not self.log_metrics or self.attachment is None or not every or step // every == self._logged_at // every:
            return
        self._logged_at = step
        metrics = self.attachment.metrics(max_keys=self.max_keys)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Undo the tie; a later fit makes a new one."""
        if self.attachment is not None:
            self._steps = self.attachment.state_dict()["steps"]
            self.attachment.remove()
            self.attachment = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Undo the tie, so that the module can be trained again."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the steps counted towards the next of `every_n_steps`."""
        return {"steps": self._steps if self.attachment is None else self.attachment.state_dict()["steps"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken up as training starts."""
        self._steps = int(state_dict["steps"])


def _data_parallel_group(strategy: Any) -> Any:
    mesh = getattr(strategy, "device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    return mesh["data_parallel"].get_group() if mesh is not None and "data_parallel" in names else None
