"""What the ten constructors have in common: their type, signature and docstring, and torchvision's older arguments."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar, cast

from torch import nn

from resnet_fused.weights import PUBLISHED, Weights

ModelT = TypeVar("ModelT", bound=nn.Module, covariant=True)


class Constructor(Protocol[ModelT]):
    """The type of ``resnet50`` and the others."""

    __name__: str

    def __call__(
        self,
        *,
        weights: Weights | None = None,
        progress: bool = True,
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = ...,
        width_per_group: int = ...,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> ModelT:
        """The model in training mode, on the default device."""
        ...


def document(make: Callable[..., nn.Module], title: str, fixed: Collection[str], model: type) -> None:
    """Gives a constructor the docstring and the signature that ``help`` shows.

    Args:
        make: takes weights, progress, and those arguments by name that ``model`` takes after its second.
        title: names the architecture.
        fixed: arguments of ``model`` that belong to the architecture.
        model: the class that is made.
    """
    _, files = published = PUBLISHED[make.__name__]
    named = ", ".join(f'"{name}"' for name in ("DEFAULT", *files))
    make.__doc__ = f"""{title}.

    Args:
        weights: None for random initialization. A name, which is one of
            {named},
            or a member of torchvision's {published.enum}: weights trained on ImageNet, which are downloaded
            once, to torch.hub's folder. A path: a file that torch.save wrote, with a state_dict, or a
            checkpoint that holds one as "state_dict" or "model".
        progress: shows the progress of a download.
        num_classes: outputs of the classifier; 1000 with weights that have a name.
        zero_init_residual: zero weight in each block's last normalization: it starts as its shortcut.
        groups, width_per_group: of the 3x3 convolution of each Bottleneck, where the name doesn't fix them.
        replace_stride_with_dilation: for each of the last three stages, whether it dilates its 3x3
            convolutions instead of halving height and width.
        norm_layer: makes a normalization from a number of channels; None is nn.BatchNorm2d.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: weights is no name and no path, or an argument has another value than weights or name imply.
        TypeError: weights is a member of another model's enum.
        ConnectionError: the weights cannot be downloaded; the message names URL and file.
        RuntimeError: weights do not fit the model, or a downloaded file has another hash.
    """
    own = list(inspect.signature(make, eval_str=True).parameters.values())[:2]
    taken = list(inspect.signature(model, eval_str=True).parameters.values())[2:]
    named_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in taken if p.name not in fixed]
    signature = inspect.Signature([*own, *named_only], return_annotation=model)
    make.__signature__ = signature  # type: ignore[attr-defined]


def torchvision_arguments(constructor: Callable[..., ModelT]) -> Constructor[ModelT]:
    """Takes what torchvision's constructors still take, with a warning: positions, and ``pretrained``.

    Raises:
        TypeError: more than two arguments by position, or one given twice.
    """

    @functools.wraps(constructor)
    def call(*args: Any, **kwargs: Any) -> ModelT:
        name = constructor.__name__
        if len(args) > 2:
            raise TypeError(
                f"{name}() takes at most 2 positional arguments, weights and progress, got {len(args)}"
            )
        for key, value in zip(("weights", "progress"), args, strict=False):
            if key in kwargs:
                raise TypeError(f"{name}() got multiple values for argument '{key}'")
            warnings.warn(f"{name}(): give '{key}' by name, not by position", UserWarning, stacklevel=2)
            kwargs[key] = value
        if "pretrained" in kwargs:
            if "weights" in kwargs:
                raise TypeError(f"{name}() takes 'weights' or 'pretrained', got both")
            kwargs["weights"] = bool(kwargs.pop("pretrained"))
        if isinstance(kwargs.get("weights"), bool):  # pretrained, by name or of old by position
            means, newest = (
                ("'IMAGENET1K_V1'", "; 'DEFAULT' are the newest") if kwargs["weights"] else ("None", "")
            )
            warnings.warn(
                f"{name}(): the parameter 'pretrained' is deprecated, use 'weights': this means "
                f"weights={means}{newest}",
                UserWarning,
                stacklevel=2,
            )
            kwargs["weights"] = "IMAGENET1K_V1" if kwargs["weights"] else None
        return constructor(**kwargs)

    return cast(Constructor[ModelT], call)
