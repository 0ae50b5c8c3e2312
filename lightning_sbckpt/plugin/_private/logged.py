"""What Lightning has logged so far, which has no public interface: taken, and put back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torchmetrics import Metric

from lightning_sbckpt.plugin.packages import LightningModule, Trainer, package_of


def epoch_metrics(trainer: Trainer) -> dict[str, Any]:
    """Return the epoch-level metrics of the loop that is ending now, and no older ones.

    `trainer.callback_metrics` also holds what earlier loops left there. `_ResultCollection.metrics`
    leaves out those of single loaders when the last of them is done: so each is asked for here.
    """
    results = cast("Any", trainer)._results
    found: dict[str, Any] = {}
    for metric in results.values():
        if metric.has_reset:
            continue
        value = results._get_cache(metric, on_step=False)
        if isinstance(value, torch.Tensor):
            found.update(dict.fromkeys(results._forked_name(metric, on_step=False), value))
    return found


def step_metrics(trainer: Trainer, names: Collection[str]) -> dict[str, Any]:
    """Return what the last training batch logged on its step alone, of these names."""
    results = trainer.fit_loop.epoch_loop._results
    found: dict[str, Any] = {}
    for metric in results.values() if names else ():
        name = metric.meta.forked_name(on_step=True)
        value = metric._forward_cache
        if metric.meta.on_step and name in names and isinstance(value, torch.Tensor):
            found[name] = value
    return found


def logged_names(trainer: Trainer) -> set[str]:
    """Return the names of what was logged, whenever it was; nothing is computed or reduced."""
    return {*trainer._logger_connector._callback_metrics, *_names_in_loops(trainer)}


def set_by_hand(trainer: Trainer) -> dict[str, Any]:
    """Return what users have put into `trainer.callback_metrics` past `self.log`."""
    metrics = trainer._logger_connector._callback_metrics
    logged = _names_in_loops(trainer)
    return {name: value for name, value in metrics.items() if name not in logged}


def _names_in_loops(trainer: Trainer) -> set[str]:
    loop = trainer.fit_loop.epoch_loop
    names: set[str] = set()
    for results in (loop._results, loop.val_loop._results):
        for metric in results.values():
            for on_step in (False, True):
                # On steps alone, only training's are seen by callbacks.
                if metric.meta.on_epoch or results.training:
                    names.update(results._forked_name(metric, on_step=on_step))
    return names


def logged_state(trainer: Trainer) -> dict[str, object]:
    """Return what has been logged in this epoch so far and is not yet a metric.

    These are the entries of the training loop's `_ResultCollection` and three dictionaries of the
    logger connector, none of which Lightning saves.
    """
    connector = trainer._logger_connector
    results = trainer.fit_loop.epoch_loop._results
    return {
        "results": {key: _result_state(metric) for key, metric in results.items()},
        "callback_metrics": dict(connector._callback_metrics),
        "logged_metrics": dict(connector._logged_metrics),
        "progress_bar_metrics": dict(connector._progress_bar_metrics),
        "first_loop_iter": connector._first_loop_iter,
        "current_fx": connector._current_fx,
    }


def restore_logged_state(trainer: Trainer, state: Mapping[str, Any]) -> list[str]:
    """Put back what `logged_state` returned; return what could not be, a sentence each."""
    result = package_of(trainer, "trainer.connectors.logger_connector.result")
    connector = trainer._logger_connector
    module = trainer.lightning_module
    results = trainer.fit_loop.epoch_loop._results
    problems: list[str] = []
    for key, saved in state["results"].items():
        meta = result._Metadata(**saved["meta"])
        sync = dict(saved["sync"])
        meta.sync = result._Sync(
            fn=trainer.strategy.reduce,
            _should=sync["should"],
            rank_zero_only=sync["rank_zero_only"],
            _op=sync["op"],
        )
        metric = result._ResultMetric(meta, saved["is_tensor"])
        if saved["is_tensor"]:
            for name, value in saved["values"].items():
                setattr(metric, name, _to(value, trainer.strategy.root_device))
        else:
            attribute = saved["meta"]["metric_attribute"]
            found = _attribute(module, attribute)
            if not isinstance(found, Metric):
                problems.append(
                    f"the value logged as {meta.name!r} so far: the module has no metric {attribute!r}"
                )
                continue
            metric.value = found
        metric._forward_cache = _to(saved["forward_cache"], trainer.strategy.root_device)
        metric._update_count = saved["update_count"]
        metric.has_reset = saved["has_reset"]
        results[key] = metric
    restore_values(trainer, state)
    connector._first_loop_iter = state["first_loop_iter"]
    connector._current_fx = state["current_fx"]
    return problems


def restore_values(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Put back only what has been computed, which belongs to no rank alone."""
    connector = trainer._logger_connector
    for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        setattr(connector, f"_{name}", dict(state[name]))


def _result_state(metric: Any) -> dict[str, object]:
    meta, sync = metric.meta, metric.meta.sync
    names = ("value", "cumulated_batch_size") if metric.is_tensor else ()
    return {
        "is_tensor": metric.is_tensor,
        "has_reset": metric.has_reset,
        "update_count": metric._update_count,
        "forward_cache": metric._forward_cache if torch.is_tensor(metric._forward_cache) else None,
        "values": {name: getattr(metric, name) for name in names if hasattr(metric, name)},
        "meta": {
            "fx": meta.fx,
            "name": meta.name,
            "prog_bar": meta.prog_bar,
            "logger": meta.logger,
            "on_step": meta.on_step,
            "on_epoch": meta.on_epoch,
            "reduce_fx": meta.reduce_fx.__name__,
            "enable_graph": meta.enable_graph,
            "add_dataloader_idx": meta.add_dataloader_idx,
            "dataloader_idx": meta.dataloader_idx,
            "metric_attribute": meta.metric_attribute,
        },
        "sync": {"should": sync._should, "rank_zero_only": sync.rank_zero_only, "op": sync._op},
    }


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _attribute(module: LightningModule, name: str | None) -> object:
    found: object = module
    for part in (name or "").split("."):
        found = getattr(found, part, None) if found is not None else None
    return found
