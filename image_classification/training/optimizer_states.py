# SPDX-License-Identifier: Apache-2.0
"""
The state of an optimiser and of its schedule, for a run that goes on, be it under other settings.

A parameter finds its state by name, whatever groups the settings make; rates, decays and the like are those of the
settings now. An optimiser's state is never given to another one.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..errors import InputError
from .sharding import divided


# Of a group, what is no setting of the optimiser's.
_APART = {"params", "param_names", "initial_lr"}
# Settings that decide which tensors the state has.
_STRUCTURAL = ("momentum", "centered", "amsgrad")
# Tensors of the state that have their parameter's shape.
_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "sum")
_MEND = "Go on with the settings that it was saved under, or start anew from its weights with --finetune."


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """The name of an optimiser's class, without accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each group before the first step: some optimisers count in them."""
    return [{key: copy.deepcopy(group[key]) for key in group.keys() - _APART} for group in optimizer.param_groups]


def fitted(saved: dict[str, Any], optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """
    A saved state for the parameters of an optimiser before its first step, as its `load_state_dict` takes it. Of each
    setting the value is the one now, unless it is what the saved run began with: then it is the saved one, which the
    optimiser may have changed. `saved` is a `state_dict`, with `kind` and `began_with` (`settings_of` it), where this
    wrote them; errors call it `folder`.

    Raises:
        InputError: it is the state of another optimiser or of other parameters.
    """
    now = optimizer.state_dict()["param_groups"]
    try:
        before, states = saved["param_groups"], saved["state"]
        kind = saved.get("kind")
        same = kind == kind_of(optimizer) if kind else before[0].keys() - _APART == now[0].keys() - _APART
        structures = [
            {(key, bool(group.get(key))) for group in groups for key in _STRUCTURAL} for groups in (before, now)
        ]
        if not same or structures[0] != structures[1]:
            raise InputError(
                f"{folder} has the state of another optimiser ({kind or 'saved by an earlier release'}) than "
                f"`optim` names now ({kind_of(optimizer)}), or under another `momentum` or `optim_args`. {_MEND}"
            )
        old, new = _places(before), _places(now)
        if old is None or new is None:  # One that groups for itself, or of an earlier release: by order.
            if [len(group["params"]) for group in before] != [len(group["params"]) for group in now]:
                raise InputError(f"{folder} has the state of other groups of parameters. {_MEND}")
            old = new = {number: (index, number) for index, group in enumerate(now) for number in group["params"]}
        if lacking := sorted(new.keys() - old.keys()):
            raise InputError(f"The optimiser in {folder} lacks {len(lacking)} parameters, as `{lacking[0]}`. {_MEND}")
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {new[name][1]: states[old[name][1]] for name in new if old[name][1] in states}
        for number, entries in state.items():
            parameter = parameters[number]
            for key, value in entries.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    entries[key] = divided(value, parameter)
                elif torch.is_tensor(value) and key in _LIKE_PARAMETER:
                    raise InputError(
                        f"{folder / 'optimizer.pt'} is of another model: `{key}` of a parameter has the shape "
                        f"{tuple(value.shape)}, expected {tuple(parameter.shape)}. {_MEND}"
                    )
        began = saved.get("began_with") or now
        groups = []
        for index, group in enumerate(now):
            was = next((old[name][0] for name in new if new[name][0] == index), None)
            saved_group = {} if was is None else before[was]
            first = {} if was is None else began[min(was, len(began) - 1)]
            kept = {
                key: value
                for key, value in saved_group.items()
                # What is not in a new group is a count that the first step begins.
                if key not in _APART and (key not in group or _plain(first.get(key)) == _plain(group[key]))
            }
            groups.append(group | kept)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'optimizer.pt'} holds no state of an optimiser: it is damaged. {_MEND}") from error
    return {"state": state, "param_groups": groups}


def load_schedule(saved: dict[str, Any], schedule: Any, folder: Path) -> None:
    """
    Go on with a schedule where the saved one was; the rates are those of the settings now. Raises `InputError` where it
    was of another kind, whose position says nothing here.
    """
    if not isinstance(saved, dict) or "last_epoch" not in saved:
        raise InputError(f"{folder / 'scheduler.pt'} holds no state of a schedule: it is damaged. {_MEND}")
    if (ours := isinstance(schedule, LambdaLR)) != ("lr_lambdas" in saved):
        setting = "sched" if ours else "lr_scheduler_type"
        raise InputError(f"{folder} has the state of another kind of schedule than `{setting}`. {_MEND}")
    if ours:
        move_to(schedule, saved["last_epoch"])
    else:
        schedule.load_state_dict(saved)


def move_to(schedule: Any, step: int) -> None:
    """Go to where a schedule is after so many steps, with the rates that it has there."""
    schedule.last_epoch, schedule._step_count = step - 1, step
    schedule.optimizer._opt_called = True  # Else PyTorch warns, if it is the first one.
    schedule.step()


def _places(groups: list[dict]) -> dict[str, tuple[int, int]] | None:
    """By the name of each parameter, the number of its group and its own; `None` where names are missing."""
    if not all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        return None
    pairs = ((index, zip(group["param_names"], group["params"])) for index, group in enumerate(groups))
    return {name: (index, number) for index, named in pairs for name, number in named}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else float(value) if torch.is_tensor(value) else value
