"""Small faults, planted one at a time in a copy of the package: the tests must see each.

Run with ``pytest -m faults``. Every fault names the tests that see it. If they pass, a test is missing, or the line
does not matter and can be deleted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("megatron_slm", "tests", "examples", "benchmarks", "tools", "pyproject.toml")
SECONDS = 300  # for the tests of one fault
TESTS_FAILED = 1  # exit code of pytest; an import error or an unknown test has another


@dataclass(frozen=True)
class Fault:
    """One error in one place, and the tests that see it."""

    name: str
    file: str  # below megatron_slm
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # files or node ids below tests


FAULTS = [
    Fault(
        "attention dropout in evaluation",
        "mcore/layers.py",
        "dropout_p=self.dropout if self.training else 0.0",
        "dropout_p=self.dropout",
        ("training/test_loop.py::test_evaluation_does_not_change_training",),
    ),
    Fault(
        "one step count shared by all parameters after loading",
        "mcore/optimizer.py",
        'state["step"] = state["step"].clone()',
        'state["step"] = state["step"]',
        ("training/test_resume.py::test_resume_is_bit_for_bit[1-1-1-distributed]",),
    ),
    Fault(
        "the same seed on all pipeline stages",
        "runtime/process.py",
        "seed_everything(seed + 100 * groups.pp_rank)",
        "seed_everything(seed)",
        ("runtime/test_process.py",),
    ),
    Fault(
        "renamed before it is on the disk",
        "runtime/files.py",
        "    sync(partial)\n    partial.replace(path)",
        "    partial.replace(path)",
        ("runtime/test_files.py",),
    ),
    Fault(
        "a last step of fewer samples than a batch",
        "config/batch_sizes.py",
        "fitting = max(limit - first, 0) // size",
        "fitting = -(-max(limit - first, 0) // size)",
        ("config/test_checks.py::test_a_run_in_samples_has_only_complete_batches",),
    ),
    Fault(
        "a manifest without its checksum is accepted",
        "config/checkpoint_files.py",
        "expected = recorded is not None or bool(manifest.checksums)",
        "expected = recorded is not None",
        ("checkpoint/test_checkpoint_integrity.py::test_edited_manifest_is_refused",),
    ),
    Fault(
        "settings that change ids are left out of a tokenizer's fingerprint",
        "tokenizers/tiktoken_tokenizer.py",
        "super().__init__(digest if settings else fingerprint_files(path),",
        "super().__init__(fingerprint_files(path),",
        ("tokenizers/test_tokenizers.py::test_tiktoken_reads_both_formats",),
    ),
    Fault(
        "damage between two chunks of an index",
        "corpus/integrity.py",
        "start : start + CHUNK + overlap]",
        "start : start + CHUNK]",
        ("corpus/test_inspection.py::test_document_that_ends_before_its_start_is_found_across_chunks",),
    ),
    Fault(
        "cached sample indices of a corpus with other documents",
        "corpus/fingerprints.py",
        'index = hashlib.file_digest(file, "sha256").hexdigest()',
        "index = str(file.seek(0, 2))",
        ("data/test_datasets.py::test_rebuilt_corpus_invalidates_the_cache",),
    ),
    Fault(
        "documents counted in the place of sequences",
        "preprocessing/merge.py",
        "first += info.sequences",
        "first += info.documents",
        ("preprocessing/test_merge.py",),
    ),
    Fault(
        "a corpus called complete before it is on the disk",
        "preprocessing/corpus_writer.py",
        "        for path in self.paths:\n            sync(path)\n",
        "",
        ("preprocessing/test_corpus_writer.py::test_a_composed_corpus_is_on_the_disk",),
    ),
    Fault(
        "ties broken by the position on a rank",
        "data/batches.py",
        "first_sample=first,",
        "first_sample=start,",
        ("data/test_batches.py::test_samples_are_in_order_for_any_batch_shape",),
    ),
    Fault(
        "a stale cache entry",
        "data/index_cache.py",
        'if entry["description"] != description:',
        'if not entry["description"]:',
        ("data/test_datasets.py::test_cache_entry_of_other_data_is_a_miss",),
    ),
    Fault(
        "samples in the order of the text",
        "data/stable_order.py",
        "    rng.shuffle(shuffle_index)\n",
        "",
        ("data/test_datasets.py::test_stable_order_shuffles_the_samples_of_a_document",),
    ),
    Fault(
        "a sidecar renamed before it is on the disk",
        "scores/writer.py",
        "        publish(partial, path)",
        "        partial.replace(path)",
        ("scores/test_sidecar.py",),
    ),
    Fault(
        "no correction of the predicted threshold",
        "objective/selection/predictor.py",
        "shares = [aim - GAIN * surplus, aim,",
        "shares = [aim, aim,",
        ("objective/selection/test_predictor.py::test_share_is_held_over_any_fifty_steps",),
    ),
    Fault(
        "no velocity of the predicted threshold",
        "objective/selection/predictor.py",
        "corrected, corrected + velocity)",
        "corrected, corrected)",
        ("objective/selection/test_predictor.py::test_the_velocity_holds_a_drift_of_more_than_the_spread",),
    ),
    Fault(
        "no anti-windup limit",
        "objective/selection/predictor.py",
        "(surplus + error).clamp(-LARGEST_SURPLUS, LARGEST_SURPLUS)",
        "surplus + error",
        (
            "objective/selection/test_predictor.py::test_a_fall_that_cannot_be_followed_is_not_made_up_for_without_limit",
        ),
    ),
    Fault(
        "the selected share of one rank",
        "objective/selection/exact.py",
        "all_reduce_sum(selected.sum(1), rankings.group)",
        "selected.sum(1)",
        ("objective/selection/test_exact.py::test_data_parallel_ranks_agree_with_one_process",),
    ),
    Fault(
        "the graph of every micro-batch is kept",
        "objective/tokens.py",
        "torch.cat([value.detach() for value in values])",
        "torch.cat(values)",
        ("objective/test_tokens.py",),
    ),
    Fault(
        "the z-loss grows with the inverse of the selected share",
        "model/experts.py",
        "self.config.moe_z_loss_coeff = self.z * share",
        "self.config.moe_z_loss_coeff = self.z",
        ("training/test_experts.py::test_auxiliary_losses_are_independent_of_selection_and_splits[aux_loss]",),
    ),
    Fault(
        "attention FLOPs without the causal half",
        "model/size.py",
        "attention = 2 * model.seq_length * query",
        "attention = 4 * model.seq_length * query",
        ("training/test_metrics.py",),
    ),
    Fault(
        "master weights of before the load",
        "checkpoint/optimizer_state.py",
        "        merge(loaded, read({",
        "        merge({}, read({",
        ("checkpoint/test_optimizer_resume.py",),
    ),
    Fault(
        "the random numbers of the reference model's weights",
        "reference/replica.py",
        "with preserved_random_state():",
        "if True:",
        ("reference/test_replica.py::test_building_the_reference_model_preserves_random_states",),
    ),
    Fault(
        "clamped losses counted again at every record",
        "reference/scoring.py",
        "self.progress))\n        self.clamped, self.recorded = 0, time.monotonic()",
        "self.progress))\n        self.recorded = time.monotonic()",
        ("reference/test_scoring.py::test_clamped_losses_are_counted_once",),
    ),
    Fault(
        "the loss of the last batch of an evaluation",
        "training/evaluation.py",
        "parts += [result.sums",
        "parts = [result.sums",
        ("training/test_loop.py::test_evaluation_does_not_change_training",),
    ),
    Fault(
        "no dropout after the first evaluation",
        "training/evaluation.py",
        "chunk.train()",
        "chunk.eval()",
        ("training/test_loop.py::test_evaluation_does_not_change_training",),
    ),
    Fault(
        "dropout's random state left out of a resume",
        "training/resume.py",
        '    get_cuda_rng_tracker().set_states(states["tracker"])\n',
        "",
        ("training/test_resume.py::test_resume_is_bit_for_bit[1-1-1-plain]",),
    ),
    Fault(
        "sums over data-parallel ranks without context-parallel ones",
        "training/metrics.py",
        "all_reduce_sum(sums, groups.dp_cp)",
        "all_reduce_sum(sums, groups.dp)",
        ("training/test_layouts.py::test_context_parallel_agrees",),
    ),
    Fault(
        "the gap of raw losses with the wrong sign",
        "analysis/summary.py",
        "gap = raw_fast - raw_slow",
        "gap = raw_slow - raw_fast",
        ("quickstart/test_quickstart.py::test_findings_and_plots",),
    ),
    Fault(
        "tokenizer flags that the reference model's settings replace",
        "cli/score_corpus.py",
        "{**to_flat_dict(config), **given_tokenizer_settings(arguments)}",
        "{**given_tokenizer_settings(arguments), **to_flat_dict(config)}",
        ("reference/test_score_corpus.py::test_tokenizer_flags_replace_the_settings_of_the_reference_model",),
    ),
    Fault(
        "a step that was abandoned before an older one",
        "config/checkpoint_steps.py",
        "[*newer, *present, *older, *abandoned]",
        "[*newer, *present, *abandoned, *older]",
        ("training/test_fallback.py::test_a_step_that_was_abandoned_is_the_last_choice",),
    ),
    Fault(
        "gate and up projection exchanged on import",
        "checkpoint/huggingface/layouts.py",
        "    def join(self, parts: Sequence[Tensor]) -> Tensor:\n        return stack(parts)",
        "    def join(self, parts: Sequence[Tensor]) -> Tensor:\n        return stack(parts[::-1])",
        ("checkpoint/huggingface/test_families.py::test_logits_and_losses_equal_those_of_transformers",),
    ),
    Fault(
        "a bias's gradient of unselected tokens in the filtered backward pass",
        "model/filtered_backward.py",
        "(grad * mask.unsqueeze(-1)).sum((0, 1))",
        "grad.sum((0, 1))",
        ("model/test_filtered_backward.py::test_gradients_equal_those_of_the_definition[gpt2]",),
    ),
    Fault(
        "document numbers of the first queries under context parallelism",
        "data/batches.py",
        "numbers[:, queries, None]",
        "numbers[:, : len(queries), None]",
        ("data/test_batches.py::test_context_parallel_slices_match_megatron_core",),
    ),
    Fault(
        "padding that cached queries attend to",
        "inference/batches.py",
        "if bool(padding.any()):",
        "if start == 0 and bool(padding.any()):",
        ("inference/test_inference_layouts.py::test_results_equal_the_definition[random-1-{}]",),
    ),
    Fault(
        "a sample's row in the place of its micro-batch",
        "training/step_report.py",
        "*(index, rank, number, row,",
        "*(index, rank, row, number,",
        ("training/test_replay.py::test_replay_from_the_start_and_refused_steps",),
    ),
    Fault(
        "packed documents received as separate samples",
        "reference/bubbles.py",
        "rows, length = row_shape(self.replica.chunks[0], samples, length, batch.attention_mask)",
        "rows = samples",
        ("reference/test_bubbles.py::test_received_activations_have_the_rows_of_packed_documents",),
    ),
    Fault(
        "no micro-batch is scored before the backward pass",
        "reference/bubbles.py",
        "if self._forwards == self.groups.pp_size - self.groups.pp_rank:",
        "if self._forwards == self.groups.pp_size - self.groups.pp_rank - 1 < 0:",
        ("reference/test_bubbles.py::test_the_first_bubble_follows_the_forward_passes_of_the_warm_up",),
    ),
    Fault(
        "scores of other micro-batches",
        "reference/bubbles.py",
        "if begun is not None and begun.micro_batches is micro_batches:",
        "if begun is not None:",
        ("reference/test_bubbles.py::test_scores_of_other_micro_batches_are_discarded",),
    ),
    Fault(
        "the upper median of the loss weights",
        "objective/linear_cross_entropy/backward_rows.py",
        "(counted.count_nonzero() - 1).clamp(min=0) >> 1",
        "counted.count_nonzero() >> 1",
        ("objective/test_linear_cross_entropy.py::test_median_without_waiting",),
    ),
    Fault(
        "the hidden gradient of a chosen row replaced by that of its residual",
        "objective/linear_cross_entropy/backward_rows.py",
        "(self.residual != 0) & ~self.chosen",
        "self.residual != 0",
        ("objective/test_linear_cross_entropy.py::test_any_guess_gives_the_same_gradient",),
    ),
    Fault(
        "numbers of rows that each head reads alone",
        "objective/linear_cross_entropy/backward_rows.py",
        "            rows.request(gradient.reshape(-1).float())\n",
        "            pass\n",
        ("training/test_host_waits.py",),
    ),
    Fault(
        "one loss weight for the hidden gradients of all rows",
        "objective/linear_cross_entropy/chunked.py",
        "forward.hidden.mul_(loss_weight[:, None])",
        "forward.hidden.mul_(scale)",
        ("objective/test_linear_cross_entropy.py::test_any_guess_gives_the_same_gradient",),
    ),
    Fault(
        "rows that are overwritten before they are read",
        "objective/linear_cross_entropy/chunked.py",
        "in reversed(slices(len(indices), SPREAD_ROWS)):",
        "in slices(len(indices), SPREAD_ROWS):",
        ("objective/test_linear_cross_entropy.py::test_many_rows",),
    ),
    Fault(
        "undefined memory as the gradient of a tied embedding",
        "objective/linear_cross_entropy/weight_gradient.py",
        'torch.zeros_like if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like',
        "torch.empty_like",
        ("objective/test_linear_cross_entropy.py::test_tied_weight_gets_both_gradients",),
    ),
    Fault(
        "the same random numbers after each fork of a state",
        "mcore/cpu.py",
        "            self.states_[name] = torch.get_rng_state()\n",
        "",
        ("mcore/test_cpu.py",),
    ),
    Fault(
        "the default random state that a fork changes",
        "mcore/cpu.py",
        "            torch.set_rng_state(before)\n",
        "",
        ("mcore/test_cpu.py",),
    ),
    Fault(
        "type names of CPU tensors in the optimizer's groups",
        "mcore/cpu.py",
        'methods = {"to": to, "type": type_,',
        'methods = {"to": to,',
        ("mcore/test_cpu.py",),
    ),
    Fault(
        "a device as a context without effect",
        "mcore/cpu.py",
        "    _device._device_constructors()  #",
        "    #",
        ("mcore/test_cpu.py",),
    ),
    Fault(
        "only direct dependents of a stage",
        "launch/chain.py",
        "if found & set(stage.after):",
        "if name in stage.after:",
        ("launch/test_commands.py::test_example_chain_is_valid",),
    ),
    Fault(
        "a finished stage whose predecessors must run again",
        "launch/chain.py",
        "is_finished and finished.issuperset(stage.after):",
        "is_finished:",
        ("launch/test_commands.py::test_stages_after_one_that_runs_again_are_not_finished",),
    ),
    Fault(
        "half of a chain in the queue",
        "launch/chain.py",
        "slurm.cancel(submitted)",
        "slurm.cancel([])",
        ("launch/test_commands.py::test_refused_stage_cancels_those_that_were_submitted",),
    ),
    Fault(
        "failures before a checkpoint count after it",
        "launch/script.py",
        '    [ "$last" = "$newest" ] || count=0\n',
        "",
        ("launch/test_script.py::test_failures_are_limited_until_a_checkpoint_is_saved",),
    ),
    Fault(
        "a run directory with a percent sign in Slurm's notation",
        "launch/script.py",
        '.replace("%", "%%")',
        "",
        ("launch/test_script.py::test_directives_are_quoted_for_sbatch",),
    ),
    Fault(
        "launch variables of the submitting shell in the job",
        "launch/script.py",
        """        f"unset {' '.join(LAUNCH_VARIABLES)}",\n""",
        "",
        ("launch/test_script.py",),
    ),
    Fault(
        "the lock of another job is removed",
        "launch/cancellation.py",
        "all(state.has_ended for state in slurm.queue([job_id]))",
        "slurm.queue([job_id]) is not None",
        ("launch/test_commands.py::test_cancel_keeps_the_lock_of_another_job",),
    ),
    Fault(
        "a tied embedding on one stage only",
        "planning/parameters.py",
        "not (is_tied and is_first)",
        "not is_tied",
        ("planning/test_parameters.py::test_stages_share_the_parameters",),
    ),
    Fault(
        "experts on every rank",
        "planning/parameters.py",
        "local = model.num_experts // layout.config.parallel.expert_model_parallel_size",
        "local = model.num_experts",
        ("planning/test_parameters.py::test_expert_parallel_ranks_share_the_experts",),
    ),
    Fault(
        "gradients in the dtype of the weights",
        "planning/communication.py",
        "gradient = 4 if config.optimizer.accumulate_allreduce_grads_in_fp32 else layout.value_bytes",
        "gradient = layout.value_bytes",
        ("planning/test_communication.py::test_gradients_and_weights_of_the_rank",),
    ),
    Fault(
        "a ranking of the global batch for each micro-batch",
        "planning/communication.py",
        'return 1 if layout.config.objective.slm_scope == "global-batch" else layout.micro_batches',
        "return layout.micro_batches",
        ("planning/test_communication.py::test_rankings_of_a_step",),
    ),
    Fault(
        "other times of the ranks in each scope",
        "planning/simulation.py",
        "np.random.default_rng(seed), np.random.default_rng(seed + 1)",
        "*(2 * [np.random.default_rng(seed)]),",
        ("planning/test_simulation.py::test_scopes_are_compared_on_the_same_times",),
    ),
    Fault(
        "ranks that never wait within a step",
        "planning/simulation.py",
        "waits = replicas.max(0).sum() if per_micro_batch else apart",
        "waits = apart",
        ("planning/test_simulation.py",),
    ),
    Fault(
        "the spread of a population in the place of a sample's",
        "analysis/curves.py",
        "losses.std(axis=0, ddof=1)",
        "losses.std(axis=0)",
        ("analysis/test_curves.py",),
    ),
    Fault(
        "the threshold of a class on one side only",
        "analysis/dynamics.py",
        "np.abs(change) > CHANGE",
        "change > CHANGE",
        ("analysis/test_dynamics.py::test_classes_of_the_paper",),
    ),
    Fault(
        "overlaps as shares of the other selection",
        "analysis/dynamics.py",
        "masks.sum(1)[:, None]",
        "masks.sum(1)",
        ("analysis/test_dynamics.py::test_selections_perplexities_and_overlaps",),
    ),
    Fault(
        "the first record of a repeated step",
        "analysis/metric_columns.py",
        "kept = np.isin(rows, len(steps) - 1 - last, assume_unique=True)",
        "kept = np.isin(rows, np.unique(steps, return_index=True)[1], assume_unique=True)",
        ("analysis/test_report.py::test_the_last_record_of_a_repeated_step_counts",),
    ),
    Fault(
        "a damaged checkpoint after a kill",
        "analysis/soak.py",
        "        verify_checkpoint(save, after)\n",
        "        pass\n",
        ("analysis/test_soak.py::test_a_lost_or_damaged_checkpoint_is_noticed",),
    ),
    Fault(
        "an older checkpoint after a kill",
        "analysis/soak.py",
        "(after is None or after < before)",
        "after is None",
        ("analysis/test_soak.py::test_a_lost_or_damaged_checkpoint_is_noticed",),
    ),
    Fault(
        "evaluations that a killed run lacks",
        "analysis/soak.py",
        "_key(record) for record in one} != expected.keys()",
        "_key(record) for record in one} > expected.keys()",
        ("analysis/test_soak.py::test_every_difference_of_the_losses_is_reported",),
    ),
    Fault(
        "rows of unpacked samples in a filtered backward pass",
        "model/selected_tokens.py",
        "selected.reshape(self._rows, -1).t()",
        "selected.t()",
        ("model/test_packed_documents.py",),
    ),
    Fault(
        "weights of the filtered MLP before they are gathered",
        "model/filtered_backward.py",
        "last_weight, last_bias = self.linear_fc2()",
        "last_weight, last_bias = self.linear_fc2.weight, self.linear_fc2.bias",
        ("training/test_filtered_runs.py::test_overlapped_gathers_are_complete_before_weights_are_used",),
    ),
    Fault(
        "an infinite band of the speculative threshold",
        "objective/selection/forward_grad.py",
        "return torch.where(value.isfinite(), value, otherwise)",
        "return value",
        ("objective/selection/test_forward_grad.py",),
    ),
]


def read(root: Path, fault: Fault) -> str:
    """Return the file of a fault."""
    return (root / "megatron_slm" / fault.file).read_text(encoding="utf-8")


def exists(test: str) -> bool:
    """Return whether a file or node id below tests names tests that exist; parameters are not compared."""
    file, _, name = test.partition("::")
    path = ROOT / "tests" / file
    return path.is_file() and (not name or f"def {name.partition('[')[0]}(" in path.read_text(encoding="utf-8"))


def copy_project(directory: Path) -> None:
    """Copy the package and its tests, with their compiled files, which remain valid."""
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, directory / name)


def run_tests(directory: Path, tests: tuple[str, ...], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run tests of a copy against the package in the copy."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu and not faults"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_every_fault_matches_the_code_once() -> None:
    stale = [fault for fault in FAULTS if read(ROOT, fault).count(fault.old) != 1 or fault.old == fault.new]
    assert not stale, [f"{fault.name}: {fault.file} does not hold {fault.old!r} once" for fault in stale]
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    missing = [test for fault in FAULTS for test in fault.tests if not exists(test)]
    assert not missing, missing


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_seen(tmp_path: Path, fault: Fault) -> None:
    copy_project(tmp_path)
    text = read(tmp_path, fault).replace(fault.old, fault.new)
    (tmp_path / "megatron_slm" / fault.file).write_text(text, encoding="utf-8")
    run = run_tests(tmp_path, fault.tests, SECONDS)
    assert run.returncode == TESTS_FAILED, f"no test sees it:\n{run.stdout}{run.stderr}"


@pytest.mark.faults
def test_without_a_fault_all_these_tests_pass(tmp_path: Path) -> None:
    copy_project(tmp_path)
    tests = tuple(dict.fromkeys(test for fault in FAULTS for test in fault.tests))
    run = run_tests(tmp_path, tests, 4 * SECONDS)
    assert run.returncode == 0, f"{run.stdout}{run.stderr}"
