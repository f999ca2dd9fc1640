"""What lime_dist needs of DeepSpeed and torch beyond their documented interfaces, and the two patches of DeepSpeed.

DeepSpeed's pipeline engine has no extension points: `LimeEngine` and `LimePipelineModule` override and read names that any
release may rename, and a hook under its old name would never be called. `NAMES` lists each of them with its signature and
the reason why we rely on it. `tests/pipeline/test_contract.py` compares the list with the installed libraries and with the
code: after an upgrade it fails for every name that is gone, has changed, or now clashes with one of ours.

Checked with torch 2.13.0 and DeepSpeed 0.19.8. Imports neither of them.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from importlib import import_module
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

SUPPORTED = {"torch": SpecifierSet(">=2.8"), "deepspeed": SpecifierSet(">=0.19.3,<0.20")}
"""Version ranges, as in pyproject.toml. torch 2.8: `torch.mm` with ``out_dtype``. DeepSpeed: the names below."""

BROKEN_DEEPSPEED = SpecifierSet(">=0.18.3,<=0.19.2")
"""These scale gradients wrongly or hang under pipelines."""

ATTRIBUTE, INSTANCE, PROPERTY, CLASS = "attribute", "set on instances", "property", "class"
"""Kinds of names that have no signature. INSTANCE: a method of the class, or of one of its bases, assigns it to ``self``."""

Entries = Mapping[str, tuple[str, str]]

ENGINE: Entries = {
    "_INSTRUCTION_MAP": (ATTRIBUTE, "maps each instruction class to the method that executes it; ours replaces methods"),
    "_aggregate_total_loss": ("(self)", "overridden: the mean loss in at least float32, on every rank"),
    "_broadcast_model": ("(self)", "overridden: initial values need no broadcast, and it fails on scalars"),
    "_exec_backward_pass": ("(self, buffer_id)", "overridden: one backward pass for the one payload"),
    "_exec_forward_pass": ("(self, buffer_id)", "overridden: no clone of the payload, no backward hook"),
    "_exec_load_micro_batch": ("(self, buffer_id)", "overridden: the buffer of an instruction is its micro-batch"),
    "_exec_optimizer_step": ("(self, lr_kwargs)", "overridden: our optimizer makes the update"),
    "_exec_recv_activations": ("(self, buffer_id)", "overridden: receives are posted early, into the history's memory"),
    "_exec_recv_grads": ("(self, buffer_id)", "overridden: receives are posted early"),
    "_exec_reduce_grads": ("(self)", "overridden: our optimizer reduces gradients"),
    "_exec_reduce_tied_grads": ("(self)", "overridden: our optimizer also adds tied gradients"),
    "_exec_schedule": ("(self, pipe_schedule)", "overridden: watches and times every instruction"),
    "_exec_send_activations": ("(self, buffer_id)", "overridden: sends do not block"),
    "_exec_send_grads": ("(self, buffer_id)", "overridden: sends do not block"),
    "_inference_schedule": ("(self, micro_batches)", "overridden: our schedule of an evaluation"),
    "_reserve_pipe_buffers": ("(self, num_buffers)", "called before a schedule, as the stock loop does"),
    "_train_schedule": ("(self)", "overridden: our schedule of a training step"),
    "__init__": ("(self, has_bool_tensors, *super_args, **super_kwargs)", "passes args, model, config, … on"),
    "data_iterator": (INSTANCE, "what LoadMicroBatch reads; train_batch sets it"),
    "device": (INSTANCE, "of this process"),
    "dp_world_size": (INSTANCE, "number of replicas, for the mean loss"),
    "fwd_outputs": (INSTANCE, "the losses of the micro-batches; the stock engine keeps them under the same name"),
    "global_rank": (INSTANCE, "of this process"),
    "global_samples": (INSTANCE, "counted by our _exec_optimizer_step, as by the stock one"),
    "global_steps": (INSTANCE, "counted by our _exec_optimizer_step, as by the stock one"),
    "grad_layer": (INSTANCE, "where the stock RecvGrad leaves the gradient of the payload"),
    "gradient_accumulation_steps": ("(self)", "micro-batches of a step as configured"),
    "grid": (INSTANCE, "the PipelineParallelGrid of the job"),
    "is_data_parallel": (INSTANCE, "whether there are several replicas"),
    "is_first_stage": ("(self)", "whether this rank holds the first stage"),
    "is_last_stage": ("(self)", "whether this rank holds the last stage"),
    "loss": (INSTANCE, "the loss of the newest micro-batch, from ForwardPass to BackwardPass"),
    "micro_batches": (INSTANCE, "read by the schedules; set before each step, since a batch may grow"),
    "module": (INSTANCE, "our LimePipelineModule"),
    "mpu": (INSTANCE, "the grid again, which has the process groups"),
    "num_pipe_buffers": (INSTANCE, "length of the lists in pipe_buffers"),
    "num_stages": (INSTANCE, "of the pipeline"),
    "optimizer": (INSTANCE, "None after construction without one; ours takes its place"),
    "pipe_buffers": (INSTANCE, "the stock engine's tensors: lists under inputs, labels, outputs"),
    "reset_activation_shape": ("(self)", "makes the stock engine announce shapes again after the batch size has changed"),
    "stage_id": (INSTANCE, "of this rank"),
    "timers": (INSTANCE, "replaced: the stock ones keep two CUDA events per step and never free them"),
    "total_loss": (INSTANCE, "sum over micro-batches; train_batch resets it to None"),
    "train_batch": ("(self, data_iter)", "runs _train_schedule and returns the aggregated loss"),
    "train_batch_size": ("(self)", "the configured global batch size"),
}  # fmt: skip

MODULE: Entries = {
    "__init__": ("(self, layers, num_stages, topology, loss_fn, ...)", "calls _partition_layers, then builds the layers"),
    "_partition_layers": ("(self, method)", "overridden: DeepSpeed takes no explicit stage bounds"),
    "_set_bounds": ("(self, start, stop)", "sets the layers of this stage"),
    "_synchronize_tied_weights": ("(self)", "overridden: both copies of a tied weight start from the same values"),
    "_topo": (INSTANCE, "the ProcessTopology; there is no public reader while the constructor runs"),
    "forward": ("(self, forward_input)", "overridden: unpacks the payload once, runs the layers, packs once"),
    "forward_funcs": (INSTANCE, "the stage's layers in order"),
    "global_rank": (INSTANCE, "of this process"),
    "loss_fn": (INSTANCE, "the constructor's argument"),
    "mpu": ("(self)", "the PipelineParallelGrid"),
    "num_stages": (INSTANCE, "of the pipeline"),
    "parts": (INSTANCE, "set by our _partition_layers as by DeepSpeed's: the bounds of all stages"),
    "stage_id": (INSTANCE, "of this rank"),
    "tied_comms": (INSTANCE, "by key of a tied layer: ranks, group, module of the weight"),
}  # fmt: skip

NAMES: Mapping[str, Entries] = {
    "deepspeed.runtime.pipe.engine.PipelineEngine": ENGINE,
    "deepspeed.runtime.engine.DeepSpeedEngine": {
        "__init__": ("(self, args, model, mpu, config, config_class, ...)", "what LimeEngine passes to it"),
    },
    "deepspeed.runtime.pipe.module.PipelineModule": MODULE,
    "deepspeed.runtime.pipe.module.LayerSpec": {
        "__init__": ("(self, typename, *module_args, **module_kwargs)", "typename must be a subclass of nn.Module"),
        "build": ("(self, log)", "overridden: builds the layer that our own description names"),
    },
    "deepspeed.runtime.pipe.module.TiedLayerSpec": {
        "__init__": ("(self, key, typename, *module_args, ...)", "layers with the same key share their module"),
    },
    "deepspeed.runtime.pipe.schedule.PipeSchedule": {
        "__init__": ("(self, micro_batches, stages, stage_id)", "the arguments of every schedule"),
        "micro_batches": (INSTANCE, "of the step"),
        "stage_id": (INSTANCE, "whose instructions the schedule yields"),
        "stages": (INSTANCE, "of the pipeline"),
        "num_pipe_buffers": ("(self)", "overridden: what _reserve_pipe_buffers gets"),
        "steps": ("(self)", "overridden: yields lists of instructions"),
    },
    "deepspeed.runtime.pipe.topology.ProcessTopology": {
        "__init__": ("(self, axes, dims)", "ranks are numbered along the last axis first"),
        "get_axis_comm_lists": ("(self, axis)", "ranks of each replica (pipe) or of each stage (data)"),
        "get_coord": ("(self, rank)", "stage and replica of a rank"),
    },
    "deepspeed.runtime.pipe.topology.PipelineParallelGrid": {
        "dp_group": (INSTANCE, "ranks that hold this stage"),
        "get_data_parallel_group": ("(self)", "process group of the ranks that hold this stage"),
        "get_pipe_parallel_group": ("(self)", "process group of the ranks of this replica"),
        "pipe_groups": (INSTANCE, "ranks of every replica, in the order of stages"),
        "stage_to_global": ("(self, stage_id, **kwargs)", "rank of a stage of this replica"),
    },
    "deepspeed.comm.torch": {
        "build_shm_op": ("()", "replaced by `disable_compiled_operations`"),
    },
    "deepspeed.comm.torch.TorchBackend": {
        "new_group": ("(self, ranks)", "replaced by `limit_new_groups`"),
    },
    "torch.distributed": {
        "DistError": (CLASS, "a RuntimeError; what NCCL and the store raise when a peer is gone"),
    },
    "torch.autograd.graph": {
        "GradientEdge": (CLASS, "keeps an output's place in the graph without its memory"),
        "get_gradient_edge": ("(tensor)", "makes one; torch.autograd.backward starts from it"),
    },
    "torch.nn.attention.flex_attention": {
        "flex_attention": ("(query, key, value, score_mod, block_mask, scale, enable_gqa, ...)", "attention within documents on CUDA"),
        "BlockMask": (CLASS, "its from_kv_blocks makes a mask from the blocks that documents leave, without a T × T table"),
    },
    "torch.Tensor": {
        "register_post_accumulate_grad_hook": ("(self, hook)", "moves low-precision gradients into the float32 sum; starts sums over replicas"),
    },
    "torch.nn.Module": {
        "_modules": (INSTANCE, "whether a submodule of this name exists"),
    },
    "torch.ops.aten": {
        "_scaled_dot_product_flash_attention": (
            "(query, key, value, dropout_p, is_causal, return_debug_mask, scale)",
            "CUDA: causal attention that returns the logarithms of its sums of exponentials",
        ),
        "_scaled_dot_product_flash_attention_backward": (
            "(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, "
            "philox_seed, philox_offset, scale)",
            "its backward, with the output and the logarithms of a softmax that has further keys",
        ),
        "_scaled_dot_product_efficient_attention": (
            "(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, scale)",
            "the same in float32 on CUDA",
        ),
        "_scaled_dot_product_efficient_attention_backward": (
            "(grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p, grad_input_mask, "
            "is_causal, scale)",
            "its backward",
        ),
        "_scaled_dot_product_flash_attention_for_cpu": (
            "(query, key, value, dropout_p, is_causal, attn_mask, scale)",
            "the same on CPUs",
        ),
        "_scaled_dot_product_flash_attention_for_cpu_backward": (
            "(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask, scale)",
            "its backward",
        ),
    },
    "torch.ops.aten.mm": {
        "dtype": ("(self, mat2, out_dtype)", "torch.mm with out_dtype: low-precision factors, float32 product (CUDA)"),
    },
    "torch.utils.tensorboard.summary": {
        "custom_scalars": ("(layout)", "makes TensorBoard records without a SummaryWriter"),
        "histogram": ("(name, values, bins, max_bins)", "makes TensorBoard records without a SummaryWriter"),
        "hparams": ("(hparam_dict, metric_dict, ...)", "makes TensorBoard records without a SummaryWriter"),
        "scalar": ("(name, tensor, ...)", "makes TensorBoard records without a SummaryWriter"),
        "text": ("(tag, text)", "makes TensorBoard records without a SummaryWriter"),
    },
}  # fmt: skip

LOGGER = "DeepSpeed"
"""Name of the logger of all of DeepSpeed."""


def unsupported(package: str, version: str) -> str:
    """Why a version of torch or DeepSpeed must not be used, and what to do; empty if it may be."""
    try:
        installed = Version(version)
    except InvalidVersion:  # such as "not installed"
        return ""
    if SUPPORTED[package].contains(installed, prereleases=True):
        return ""
    reason = f"lime_dist needs {package}{SUPPORTED[package]}"
    if package == "deepspeed" and BROKEN_DEEPSPEED.contains(installed, prereleases=True):
        reason = "0.18.3 to 0.19.2 scale gradients wrongly or hang under pipelines"
    return f"{reason}; pip install -c constraints.txt {package}"


def disable_compiled_operations() -> None:
    """Keep DeepSpeed from compiling, on CPUs, a shared-memory operation that only inference uses: half a minute at the first
    start on a machine that has a compiler. Call it before ``deepspeed.init_distributed``."""
    backend: Any = import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def limit_new_groups(timeout: timedelta) -> None:
    """Give every process group that DeepSpeed makes from now on this time-out. DeepSpeed takes none for them, so that they would have
    NCCL's 10 minutes or gloo's 30."""
    backend: Any = import_module("deepspeed.comm.torch").TorchBackend
    distributed: Any = import_module("torch.distributed")
    backend.new_group = lambda _, ranks: distributed.new_group(ranks, timeout=timeout)


@contextlib.contextmanager
def quiet_logger() -> Iterator[None]:
    """Let DeepSpeed log errors only, from now on. A logger that is created within keeps ``sys.stdout`` as its stream, which may
    be redirected to a file that is closed afterwards: on leaving, its handlers write to ``sys.stderr``."""
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.stream = sys.stderr
