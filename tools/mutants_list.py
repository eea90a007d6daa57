"""The faults of tools.mutants: what is replaced where, and the tests that hold the behaviour."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        name: what is wrong, in plain words.
        file: from the root of the repository.
        text: a piece of its source, which is in it exactly once.
        replacement: what is there instead.
        tests: files, names and options, as for pytest.
        interpreted: whether the tests are those of Triton's interpreter.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: str
    interpreted: bool = False

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def build_order(self) -> tuple[bool, str]:
        """Faults of one compiled file are neighbors."""
        return self.is_compiled, self.file if self.is_compiled else ""

    def planted_in(self, source: str) -> str:
        """The source with the fault.

        Raises:
            ValueError: its text is not in the source exactly once.
        """
        count = source.count(self.text)
        if count != 1:
            raise ValueError(
                f"{self.name}: {self.file} has its text {count} times, not once: mend tools/mutants_list.py"
            )
        return source.replace(self.text, self.replacement)


MODULES = "resnet_fused/modules.py"
STATS = "resnet_fused/ops/bn_stats.py"
FOLD = "resnet_fused/ops/fold_algebra.py"
FORWARD = "resnet_fused/ops/block_forward.py"
BACKWARD = "resnet_fused/ops/block_backward.py"
BLOCK = "resnet_fused/ops/residual_block.py"
INFERENCE = "resnet_fused/ops/inference.py"
TILES = "resnet_fused/kernels/tiles.py"

CHANGED = "tests/test_changed_modules.py"
OPS = "tests/ops/test_accuracy.py::test_equals_autograd_in_float64 -k auto"
NAN = "tests/ops/test_accuracy.py::test_nan_goes_through_as_in_eager -k auto"
BLOCKS = "tests/ops/test_residual_block.py::test_float64_equals_plain -k auto"
FROZEN = "tests/compat/test_backward.py::test_frozen_parameters -k 'nchw and identity and bn2'"
HOOKS = "tests/test_drop_in.py::test_a_changed_block_runs_plain_and_says_so -k nhwc"
FOLDS = "tests/ops/test_inference.py::test_folds_anew_after"
SYNC = "tests/test_sync_batch_norm.py::test_two_processes_equal_one"
RULE = "tests/reference/test_accuracy_rule.py -k 'half_again or one_draw or excuse'"
RESUME = "tests/cli/test_resume.py::test_resumed_equals_uninterrupted -k end"
KERNEL = "tests/kernels/test_accuracy.py::test_conv_bn_stats -k '3x3 and not dilation'"
MERGES = "tests/kernels/test_reductions.py::test_norm_statistics -k 'not 4500'"
CACHE = "tests/kernels/test_cache.py -k 'damaged or one_version'"
CONV3X3 = "tests/ops/test_conv3x3.py::test_operands"
WGRAD = "tests/ops/test_conv_wgrad.py::test_operands tests/ops/test_conv_wgrad.py::test_strategies"

#: By what they concern.
MUTANTS: dict[str, list[Mutant]] = {
    "statistics of batch norms": [
        Mutant(
            "running variance takes the biased variance",
            STATS,
            "each.pixels / (each.pixels - 1) for each",
            "each.pixels / (each.pixels - 0) for each",
            CHANGED,
        ),
        Mutant(
            "momentum is that of the running statistics",
            STATS,
            "torch._foreach_lerp_(running, batch, momentum)",
            "torch._foreach_lerp_(running, batch, 1 - momentum)",
            CHANGED,
        ),
        Mutant(
            "running variance is not updated",
            STATS,
            "var.to(bn.running_var.dtype)]",
            "bn.running_var.clone()]",
            CHANGED,
        ),
        Mutant(
            "num_batches_tracked is not counted",
            STATS,
            "torch._foreach_add_(counters, 1)",
            "torch._foreach_add_(counters, 0)",
            CHANGED,
        ),
        Mutant(
            "eps outside of the root, of running statistics",
            STATS,
            "torch.rsqrt(bn.running_var.to(dtype) + bn.eps).contiguous()",
            "(torch.rsqrt(bn.running_var.to(dtype)) + bn.eps).contiguous()",
            CHANGED,
        ),
        Mutant(
            "momentum None is 0.1",
            MODULES,
            "momentum = 1.0 / (float(batches) + 1.0)",
            "momentum = 0.1",
            CHANGED,
        ),
        Mutant(
            "track_running_stats False is ignored where there are buffers",
            MODULES,
            "tracked = not bn.training or bn.track_running_stats",
            "tracked = True",
            CHANGED,
        ),
        Mutant(
            "without running statistics evaluation takes none of the batch",
            MODULES,
            "training = bn.training or (bn.running_mean is None and bn.running_var is None)",
            "training = bn.training",
            CHANGED,
        ),
        Mutant(
            "eps outside of the root, of the batch's statistics",
            "csrc/cpu/batch_norm_stats.cpp",
            "1 / std::sqrt(variance + op.eps)",
            "1 / (std::sqrt(variance) + op.eps)",
            OPS,
        ),
        Mutant(
            "moments of tasks are merged with the wrong count",
            "csrc/cpu/batch_norm_stats.cpp",
            "m2[i] += other_m2[i] + delta * delta * count * share;",
            "m2[i] += other_m2[i] + delta * delta * rows * share;",
            "tests/ops/test_accuracy.py::test_statistics_of_many_tasks",
        ),
    ],
    "statistics of several processes": [
        Mutant(
            "sums are not scaled by the process's part of the pixels",
            STATS,
            "list((stacked * count_fraction).unbind())",
            "list(stacked.unbind())",
            SYNC,
        ),
        Mutant(
            "unbiased variance counts the process's own pixels",
            STATS,
            "BatchStats(mean, invstd, pixels / count), merged, var, count)",
            "BatchStats(mean, invstd, pixels / count), merged, var, pixels)",
            SYNC,
        ),
        Mutant(
            "dW of a folded convolution lacks the shift's part",
            FOLD,
            "dweight = dweight.addr(sum_dz + total, fold.shift)",
            "dweight = dweight.addr(total, fold.shift)",
            SYNC,
        ),
        Mutant(
            "progress counts the images of one process",
            "resnet_fused/cli/learner.py",
            "int(counts[:, 1].sum()), self.settings.batch_size * self.world.size)",
            "int(counts[:, 1].sum()), self.settings.batch_size)",
            "tests/cli/test_distributed.py::test_progress_counts_all_processes",
        ),
    ],
    "gradients of batch norms and masks": [
        Mutant(
            "sign of the mean of dz in dy, after a ReLU",
            "csrc/cpu/bn_relu.cpp",
            "dz + (centred * slope[i] + offset[i]) : dz;",
            "dz + (centred * slope[i] - offset[i]) : dz;",
            OPS,
        ),
        Mutant(
            "a ReLU lets the gradient through at zero",
            "csrc/cpu/bn_relu.cpp",
            "const S dz = centred * scale[i] + bias[i] <= 0 ? S(0) : da;\n        const S sum",
            "const S dz = centred * scale[i] + bias[i] < 0 ? S(0) : da;\n        const S sum",
            "tests/test_functional.py::test_relu_at_zero",
        ),
        Mutant(
            "sign of the term of y in dy, after a sum",
            "csrc/cpu/bn_add_relu.cpp",
            "dz + ((load(y[i]) - mean[i]) * slope[i] + offset[i]) : dz;",
            "dz + (offset[i] - (load(y[i]) - mean[i]) * slope[i]) : dz;",
            OPS,
        ),
        Mutant(
            "a mask has a bit where the sum is zero",
            "csrc/cpu/bn_add_relu.cpp",
            "active[i] = !(z <= 0);",
            "active[i] = !(z < 0);",
            "tests/test_functional.py::test_relu_at_zero",
        ),
        Mutant(
            "the residual is added before the batch norm",
            "csrc/cpu/bn_add_relu.cpp",
            "(load(y[i]) - mean[i]) * scale[i] + bias[i] + load(residual[i]);",
            "(load(y[i]) + load(residual[i]) - mean[i]) * scale[i] + bias[i];",
            OPS,
        ),
        Mutant(
            "the mask of a saved gradient is ignored",
            "csrc/cpu/masked_grad.cpp",
            "const S dz = active[i] ? da : S(0);",
            "const S dz = active[i] ? da : da;",
            "tests/ops/test_into.py::test_masked_grad -k 'plain and native'",
        ),
        Mutant(
            "mask bits are read in the other order",
            "resnet_fused/layout.py",
            "((mask.unsqueeze(-1) >> bits) & 1)",
            "((mask.unsqueeze(-1) >> (7 - bits)) & 1)",
            "tests/reference/test_layout.py",
        ),
        Mutant(
            "a bias for backward is not copied",
            BLOCK,
            "return bias.clone()",
            "return bias",
            "tests/test_autograd.py::test_a_bias_may_change_before_backward -k 'basic and nhwc'",
        ),
        Mutant(
            "a frozen norm's backward takes the batch's sums",
            STATS,
            "    if mode.training:\n        sums = [*",
            "    if True:\n        sums = [*",
            OPS,
        ),
    ],
    "the max-pool": [
        Mutant(
            "the index of a window at the border is off",
            "csrc/cpu/bn_relu_maxpool.cpp",
            "index = wins ? taps.code[k] : index;",
            "index = wins ? k : index;",
            OPS,
        ),
        Mutant(
            "a NaN is not taken for the maximum",
            "csrc/cpu/bn_relu_maxpool.cpp",
            "const bool wins = (z > best) | (z != z);",
            "const bool wins = z > best;",
            NAN,
        ),
        Mutant(
            "ceil_mode is ignored",
            MODULES,
            'return "has another mode" if pool.ceil_mode or pool.return_indices else None',
            'return "has another mode" if pool.return_indices else None',
            CHANGED,
        ),
        Mutant(
            "dilation of the pool is ignored",
            MODULES,
            '"stride": 2, "padding": 1, "dilation": 1}',
            '"stride": 2, "padding": 1}',
            CHANGED,
        ),
    ],
    "whether a block may run fused": [
        Mutant(
            "a convolution's bias is ignored",
            MODULES,
            "if conv.bias is not None:",
            "if conv.bias is conv.weight:",
            CHANGED,
        ),
        Mutant(
            "padding_mode is ignored",
            MODULES,
            'if conv.padding_mode != "zeros" or isinstance',
            "if isinstance",
            CHANGED,
        ),
        Mutant(
            "forward hooks are ignored",
            MODULES,
            "        module._forward_hooks,\n",
            "",
            HOOKS,
        ),
        Mutant(
            "forward pre-hooks are ignored",
            MODULES,
            "        module._forward_pre_hooks,\n",
            "",
            HOOKS,
        ),
        Mutant(
            "backward hooks are ignored",
            MODULES,
            "        module._backward_hooks,\n",
            "",
            CHANGED,
        ),
        Mutant(
            "backward pre-hooks are ignored",
            MODULES,
            "        module._backward_pre_hooks,\n",
            "",
            CHANGED,
        ),
        Mutant(
            "dilation is ignored where a native 3x3 convolution is chosen",
            "resnet_fused/ops/conv3x3.py",
            "and tuple(geometry) == _GEOMETRY",
            "and (*geometry[:2], *geometry[3:]) == (*_GEOMETRY[:2], *_GEOMETRY[3:])",
            "tests/ops/test_conv3x3.py::test_other_geometries_are_the_vendors",
        ),
        Mutant(
            "groups are ignored where a convolution is folded",
            BLOCK,
            "if kernel != [1, 1] or conv.groups != 1 or conv.padding",
            "if kernel != [1, 1] or conv.padding",
            CHANGED,
        ),
    ],
    "blocks": [
        Mutant(
            "the shortcut's norm has the first norm's eps",
            FORWARD,
            "branches.append(_branch(a, shift, weights[-1].to(x.dtype), parameters[-1], spec, triton))",
            "branches.append(_branch(a, shift, weights[-1].to(x.dtype), parameters[-1],"
            " spec._replace(eps=block.convs[0].eps), triton))",
            CHANGED,
        ),
        Mutant(
            "the shortcut's norm has the other's eps, in contiguous blocks",
            "resnet_fused/blocks.py",
            "batch_norm_of(bn), batch_norm_of(downsample[-1]))",
            "batch_norm_of(bn), batch_norm_of(downsample[-1])._replace(eps=bn.eps))",
            CHANGED,
        ),
        Mutant(
            "the shortcut is subsampled along the wrong axes",
            "resnet_fused/layout.py",
            "x[:, :, :: input_stride[0], :: input_stride[1]].contiguous(",
            "x[:, :, :: input_stride[1], :: input_stride[0]].contiguous(",
            CHANGED,
        ),
        Mutant(
            "the shortcut's input stride is ignored in backward",
            BACKWARD,
            "shortcut = (dskip, None, self.specs[-1].input_stride)",
            "shortcut = (dskip, None, (1, 1))",
            BLOCKS,
        ),
        Mutant(
            "a block's input gets the shortcut's gradient without the mask",
            BACKWARD,
            "(grad, self.mask, (1, 1))",
            "(grad, None, (1, 1))",
            BLOCKS,
        ),
        Mutant(
            "the residual is added twice",
            "resnet_fused/blocks.py",
            "return ops.bn_add_relu(y, skip.to(y.dtype), batch_norm_of(bn))",
            "return ops.bn_add_relu(y, 2 * skip.to(y.dtype), batch_norm_of(bn))",
            FROZEN,
        ),
        Mutant(
            "gradients of frozen weights are computed",
            BACKWARD,
            "needs = [needs_input, self.needs_weight[i]]",
            "needs = [needs_input, True]",
            "tests/ops/test_residual_block.py::test_computes_no_gradient_that_is_not_needed",
        ),
        Mutant(
            "the input's gradient is computed where none is needed",
            BACKWARD,
            "*shortcut, needs_input=self.needs_input)",
            "*shortcut, needs_input=True)",
            "tests/ops/test_residual_block.py::test_computes_no_gradient_that_is_not_needed",
        ),
        Mutant(
            "autocast's dtype is ignored",
            BLOCK,
            "dtype = autocast_dtype(device) or x.dtype",
            "dtype = x.dtype",
            "tests/compat/test_backward.py::test_checkpointing_under_autocast_recomputes_the_same",
        ),
        Mutant(
            "autocast rounds float64",
            BLOCK,
            "dtype = x.dtype  # autocast leaves it alone",
            "pass",
            "tests/ops/test_residual_block.py::test_autocast_leaves_float64_alone",
        ),
    ],
    "folded convolutions": [
        Mutant(
            "dW lacks the term P b (W S)",
            FOLD,
            "dweight = q + (slope * pixels)[:, None] * matrix_mm_nt(wide, fold.covariance)",
            "dweight = q",
            BLOCKS,
        ),
        Mutant(
            "dW lacks the mean of the centered input",
            FOLD,
            "factor[:, None] * dweight.addr(total, fold.mean)",
            "factor[:, None] * dweight",
            BLOCKS,
        ),
        Mutant(
            "the input's gradient lacks the mean of the centered input",
            FOLD,
            "vector = offset @ scaled.to(wide.dtype) - matrix.to(wide.dtype) @ fold.mean",
            "vector = offset @ scaled.to(wide.dtype)",
            BLOCKS,
        ),
        Mutant(
            "the running mean lacks the shift",
            FOLD,
            "mean_y.clone() if shift is None else mean_y + wide @ shift",
            "mean_y.clone()",
            BLOCKS,
        ),
        Mutant(
            "eps outside of the root, of a folded convolution",
            FOLD,
            "return mean_y, true_mean, var, torch.rsqrt(var + eps)",
            "return mean_y, true_mean, var, torch.rsqrt(var) + eps",
            BLOCKS,
        ),
        Mutant(
            "weights folded for evaluation are never folded anew",
            INFERENCE,
            "if folded is None or folded.signature != signature:",
            "if folded is None:",
            FOLDS,
        ),
        Mutant(
            "a change that PyTorch does not count is not seen",
            INFERENCE,
            "*conv[2:], checksum, *counters",
            "*conv[2:], *counters",
            FOLDS,
        ),
    ],
    "native convolutions": [
        Mutant(
            "a sign in the output transform of Winograd's algorithm",
            "csrc/cpu/conv/tiles.h",
            "out[2 * i + 1] = t[i][1] - t[i][2] - t[i][3];",
            "out[2 * i + 1] = t[i][1] - t[i][2] + t[i][3];",
            CONV3X3,
        ),
        Mutant(
            "padding is not zero but the first pixel's value",
            "csrc/cpu/conv/tiles.h",
            "store(window + c, inside ? operand.at(pixel, c0 + c, n) : Vec{});",
            "store(window + c, operand.at(inside ? pixel : 0, c0 + c, n));",
            CONV3X3,
        ),
        Mutant(
            "the last block's part of the sums is dropped",
            "csrc/cpu/conv/winograd.h",
            "double total = 0, total_centred = 0;\n    for (int64_t block = 0; block < tiling.blocks; block++) {",
            "double total = 0, total_centred = 0;\n    for (int64_t block = 0; block + 1 < tiling.blocks; block++) {",
            CONV3X3,
        ),
        Mutant(
            "the last part of a weight gradient is dropped",
            "csrc/cpu/conv/implicit_wgrad.h",
            "for (int64_t part = 1; part < at.parts; part++) sum +=",
            "for (int64_t part = 1; part + 1 < at.parts; part++) sum +=",
            WGRAD,
        ),
    ],
    "Triton kernels and the autotuner": [
        Mutant(
            "the last tile counts as a whole one",
            "resnet_fused/kernels/reductions.py",
            "tl.maximum(tl.minimum(TILE_PIXELS, pixels - tile * TILE_PIXELS), 0)[None, :]",
            "(TILE_PIXELS + 0 * tile)[None, :]",
            MERGES,
            interpreted=True,
        ),
        Mutant(
            "eps outside of the root, of a kernel",
            "resnet_fused/kernels/reductions.py",
            "(1.0 / tl.sqrt(variance + eps))",
            "(1.0 / (tl.sqrt(variance) + eps))",
            MERGES,
            interpreted=True,
        ),
        Mutant(
            "partial sums have the wrong stride",
            "resnet_fused/kernels/reductions.py",
            "tile_squares = tl.load(pointers + 2 * channels * tiles, valid",
            "tile_squares = tl.load(pointers + 2 * channels * (tiles - 1), valid",
            MERGES,
            interpreted=True,
        ),
        Mutant(
            "padding of relu(bn(x)) is padding of x",
            TILES,
            "                z *= pixel_valid.to(tl.float32)[:, None]\n",
            "                z += 0.0\n",
            KERNEL,
            interpreted=True,
        ),
        Mutant(
            "pixels beyond the last count in a tile's statistics",
            "resnet_fused/kernels/conv_bn_stats.py",
            "deviation = tl.where(valid, value - tile_mean[None, :], 0.0)",
            "deviation = value - tile_mean[None, :]",
            KERNEL,
            interpreted=True,
        ),
        Mutant(
            "a cache's header is ignored",
            "resnet_fused/kernels/autotune/cache.py",
            'if not fits(content["header"]):',
            'if not content["header"]:',
            CACHE,
        ),
    ],
    "checkpoints and the accuracy rule": [
        Mutant(
            "a resumed run draws other random numbers",
            "resnet_fused/cli/checkpoint.py",
            'torch.set_rng_state(state["cpu"])',
            "torch.set_rng_state(torch.get_rng_state())",
            "tests/cli/test_checkpoint.py",
        ),
        Mutant(
            "a resumed run's optimizer starts anew",
            "resnet_fused/cli/optimizers.py",
            'optimizer.load_state_dict({"state": state["state"]',
            'optimizer.load_state_dict({"state": {}',
            RESUME,
        ),
        Mutant(
            "the accuracy rule passes everything",
            "tests/accuracy.py",
            "if not by_fused <= most:",
            "if not by_fused <= math.inf:",
            RULE,
        ),
        Mutant(
            "the accuracy rule lets an exact draw excuse the others",
            "tests/accuracy.py",
            "math.log(max(value, least))",
            "math.log(max(value, 1e-300))",
            "tests/reference/test_accuracy_rule.py -k without_any_error",
        ),
    ],
}
