"""Protects the configuration: values are read as written, and every error is one line that says what to do."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from lime_dist import load_config
from lime_dist.config.deepspeed import batch_split, deepspeed_config
from lime_dist.config.load import dump_config
from lime_dist.config.registry import ARCHITECTURES
from lime_dist.config.schema import Config
from lime_dist.config.synonyms import NOTES, SYNONYMS, UNSUPPORTED
from lime_dist.config.unknown_keys import known_keys
from lime_dist.errors import LimeError

ROOT = Path(__file__).resolve().parents[2]


def test_overrides_replace_the_file_and_the_resolved_configuration_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 5\n  seed: 3\noptimizer:\n  lr: 1e-3\n")
    config = load_config(path, ["train.steps=7", "model.num_key_value_heads=null", "optimizer.betas=[0.8, 0.9]"])
    assert (config.train.steps, config.train.seed, config.optimizer.lr) == (7, 3, 1e-3)
    assert config.optimizer.betas == (0.8, 0.9) and config.model.key_value_heads == config.model.num_attention_heads
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_configuration_in_the_repository_is_valid(path: Path) -> None:
    load_config(path)


def kind_of(config: Config) -> tuple[object, ...]:
    """What tells models apart beside their shape."""
    model = config.model
    own: dict[str, tuple[object, ...]] = {
        "lime": (model.lime.routes, model.lime.router, model.lime.depth_attention),
        "hyper": (model.hyper.connection,),
    }
    return model.architecture, *own.get(model.architecture, ())


def test_every_model_is_one_line_of_overrides_away_at_every_depth() -> None:
    """The table of docs/models.md names every architecture, and every kind that configs/paper/ has at 1.2 B."""
    rows = re.findall(
        r"^\| .+ \| `(model\.architecture=\w+[^`]*)` \|$", (ROOT / "docs/models.md").read_text(), re.MULTILINE
    )
    kinds = {kind_of(load_config(ROOT / "configs/deep/llama_64.yaml"))}
    for row, depth in itertools.product(rows, (32, 64, 128)):
        config = load_config(ROOT / f"configs/deep/llama_{depth}.yaml", row.split())
        assert config.model.num_hidden_layers == depth
        kinds.add(kind_of(config))
    assert {architecture for architecture, *_ in kinds} == set(ARCHITECTURES)
    assert {kind_of(load_config(path)) for path in (ROOT / "configs/paper").glob("*.yaml")} <= kinds


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.stpes=5", "unknown key train.stpes=5 in the command line; the nearest valid key is train.steps"),
        ("model.lime.history={policy:chunked}", "unknown key model.lime.history.policy:chunked=None in the command line; the nearest"),
        ("model.rope_scaling={rope_type:linear}", "unknown key model.rope_scaling.rope_type:linear=None in the command line; the nearest"),
        ("pipeline_stages=2", "unknown key pipeline_stages=2 in the command line; the nearest valid key is parallel.pipeline_stages"),
        ("optimzer.lr=1", "the nearest valid key is optimizer"),
        ("model.lime.historyy.policy=full", "the nearest valid key is model.lime.history"),
        ("train.steps=many", "train.steps='many' in the command line: input should be a valid integer"),
        ("train.steps=1.5", "train.steps=1.5 in the command line: input should be a valid integer"),
        ("train.steps=-1", "train.steps=-1 in the command line: input should be greater than or equal to 0"),
        ("precision=fp8", "precision='fp8' in the command line: input should be 'fp32', 'bf16' or 'fp64'"),
        ("optimizer.lr=.inf", "optimizer.lr=inf in the command line: input should be a finite number"),
        ("train=5", "train=5 in the command line"),
        ("model.hidden_size=130", "model.hidden_size=130 does not divide into model.num_attention_heads=4 heads"),
        ("model.hidden_size=12", "odd head size"),
        ("model.num_key_value_heads=3", "model.num_key_value_heads=3 does not divide model.num_attention_heads=4"),
        ("parallel.pipeline_stages=17", "parallel.pipeline_stages=17 is more than model.num_hidden_layers=16"),
        ("parallel.stage_layers=[8,8]", "parallel.stage_layers=[8, 8] must be 1 positive numbers"),
        ("optimizer.min_lr=1", "optimizer.min_lr=1.0 is above optimizer.lr=0.001"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas=[0.9, 1.0] must lie in [0, 1)"),
        ("monitor.router_layer=16", "monitor.router_layer=16 is past the last layer, 15 (model.num_hidden_layers=16)"),
        ("monitor.peak_flops=0", "monitor.peak_flops=0 in the command line: input should be greater than 0"),
        ("run.directory=2023-02-30", "cannot read the value of run.directory: '2023-02-30' is not valid YAML"),
        ("train.steps", "cannot read the override 'train.steps'; write section.key=value"),
        ("train.steps.more=1", "train.steps={'more': 1} in the command line: input should be a valid integer"),
    ],
)  # fmt: skip
def test_an_invalid_override_is_reported_in_one_line(override: str, line: str) -> None:
    with pytest.raises(LimeError) as caught:
        load_config(None, [override])
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "valid"),
    [
        ("optimizer.learning_rate", "optimizer.lr"),  # Hugging Face
        ("train.gradient_accumulation_steps", "train.global_batch_size (accumulation follows"),
        ("train.max_steps", "train.steps"),
        ("train.num_train_epochs", "train.steps (it counts optimizer steps)"),
        ("train.per_device_train_batch_size", "train.micro_batch_size"),
        ("train.gradient_checkpointing", "parallel.activation_checkpointing"),
        ("train.save_total_limit", "train.keep_last"),
        ("train.eval_steps", "train.evaluation_interval"),
        ("optimizer.lr_scheduler_type", "optimizer.schedule"),
        ("optimizer.warmup_ratio", "optimizer.warmup_steps (it counts optimizer steps)"),
        ("output_dir", "run.directory"),
        ("train.bf16", "precision"),
        ("bf16.enabled", "precision"),
        ("model.max_position_embeddings", "data.sequence_length"),
        ("model.num-layers", "model.num_hidden_layers"),  # Megatron
        ("model.ffn_hidden_size", "model.intermediate_size"),
        ("model.num_query_groups", "model.num_key_value_heads"),
        ("model.rotary_base", "model.rope_theta"),
        ("model.rope_parameters", "model.rope_scaling"),
        ("model.rope_scaling.type", "model.rope_scaling.rope_type"),
        ("train.train_iters", "train.steps"),
        ("optimizer.clip-grad", "optimizer.max_grad_norm"),
        ("optimizer.lr_warmup_iters", "optimizer.warmup_steps"),
        ("optimizer.lr_decay_style", "optimizer.schedule"),
        ("optimizer.adam_beta2", "optimizer.betas (write both"),
        ("data.seq_length", "data.sequence_length"),
        ("parallel.pipeline_model_parallel_size", "parallel.pipeline_stages"),
        ("parallel.use_distributed_optimizer", "parallel.zero_stage"),
        ("parallel.recompute_granularity", "parallel.activation_checkpointing"),
        ("model.dim", "model.hidden_size"),  # torchtitan
        ("model.n_kv_heads", "model.num_key_value_heads"),
        ("training.local_batch_size", "train.micro_batch_size"),
        ("training.seq_len", "data.sequence_length"),
        ("training.max_norm", "optimizer.max_grad_norm"),
        ("parallelism.pipeline_parallel_degree", "parallel.pipeline_stages"),
        ("checkpoint.interval", "train.checkpoint_interval"),
        ("checkpoint.async_mode", "checkpoint.asynchronous"),
        ("checkpoint.keep_latest_k", "train.keep_last"),
        ("validation.freq", "train.evaluation_interval"),
        ("validation.steps", "train.evaluation_samples"),
        ("activation_checkpoint.mode", "parallel.activation_checkpointing"),
        ("job.dump_folder", "run.directory"),
        ("metrics.log_freq", "train.log_interval"),
        ("zero_optimization.stage", "parallel.zero_stage"),  # DeepSpeed
        ("gradient_clipping", "optimizer.max_grad_norm"),
        ("optim.lr", "optimizer.lr"),  # a valid name in another section
        ("training.steps", "train.steps"),
        ("lime.history.policy", "model.lime.history.policy"),
        ("optimizer.learning_rte", "optimizer.lr"),  # misspelt
        ("train.gradient_acumulation_step", "train.global_batch_size"),
        ("train.evaluation_sample", "train.evaluation_samples"),
        ("optimizer.betsa", "optimizer.betas"),
        ("optimizer.min_rl", "optimizer.min_lr"),
        ("monitor.routr_layer", "monitor.router_layer"),
    ],
)  # fmt: skip
def test_the_names_of_other_trainers_and_misspelt_ones_lead_to_the_key(key: str, valid: str) -> None:
    with pytest.raises(LimeError) as caught:
        load_config(None, [f"{key}=1"])
    rest = str(caught.value).removeprefix(f"unknown key {key}=1 in the command line; the nearest valid key is ")
    assert rest == valid or rest.startswith(valid if "(" in valid else f"{valid} (")


def test_the_names_of_what_is_not_supported_say_so() -> None:
    with pytest.raises(LimeError, match="tensor, sequence and context parallelism are not supported"):
        load_config(None, ["parallel.tensor_model_parallel_size=2"])
    with pytest.raises(LimeError, match="number of replicas follows from the number of processes"):
        load_config(None, ["parallel.data_parallel_size=2"])


def test_synonyms_lead_to_keys_that_exist_from_names_that_do_not() -> None:
    valid = set(known_keys())
    assert {key for key in SYNONYMS.values() if key not in valid} == set()
    assert {name for name in (*SYNONYMS, *UNSUPPORTED) if name in valid and "." in name} == set()
    assert set(NOTES) <= set(SYNONYMS) and not set(SYNONYMS) & set(UNSUPPORTED)
    sections = {key.partition(".")[0] for key in SYNONYMS.values()}
    assert sections == {field for field in Config.model_fields}


def test_an_unknown_key_of_a_blend_leads_to_its_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  blend:\n    - {path: a, wieght: 1}\n")
    with pytest.raises(
        LimeError, match=r"unknown key data\.blend\.0\.wieght=1 in .*; the nearest valid key is data\.blend\.weight"
    ):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train: [1", "is not valid YAML"),
        ("- 1\n", "must contain sections"),
        ("train:\n  steps: 1\n  steps: 2\n", "duplicate key 'steps'"),
        ("train:\n  stpes: 1\n", "unknown key train.stpes=1 in"),
    ],
)
def test_an_invalid_file_is_reported_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(LimeError) as caught:
        load_config(path)
    assert line in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(LimeError, match="cannot read the configuration .*nothing.yaml"):
        load_config(tmp_path / "nothing.yaml")


def test_a_batch_that_cannot_be_divided() -> None:
    config = load_config(None, ["parallel.pipeline_stages=2", "train.global_batch_size=12", "train.micro_batch_size=2"])
    assert batch_split(config, 4) == (2, 3)
    assert deepspeed_config(config, 4)["gradient_accumulation_steps"] == 3
    with pytest.raises(LimeError, match="train.global_batch_size=12 is not micro-batch × accumulation × width"):
        batch_split(config, 8)
    with pytest.raises(LimeError, match="parallel.pipeline_stages=2 does not divide the 3 processes"):
        batch_split(config, 3)


def test_a_default_does_not_stop_a_run_over_a_key_that_nobody_set() -> None:
    """A default gives way where a key that was set would make it impossible; a value that was set does not."""
    assert load_config(None, ["optimizer.lr=1e-7"]).optimizer.min_lr == 1e-7
    assert load_config(None, ["model.lime.history={policy: chunked, chunk_size: 1}"]).model.lime.history.first == 1
    with pytest.raises(LimeError, match="optimizer.min_lr=1e-06 is above optimizer.lr=1e-07"):
        load_config(None, ["optimizer.lr=1e-7", "optimizer.min_lr=1e-6"])
    with pytest.raises(LimeError, match="model.lime.history.first=2 is more than the 1 layers of a chunk"):
        load_config(None, ["model.lime.history={policy: chunked, chunk_size: 1, first: 2}"])


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_config(None).train.steps = 3
