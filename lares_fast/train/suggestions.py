"""Find the setting or the option that a user may have meant by an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

# What other programs call a setting, without its section.
_SYNONYMS = {
    "lr": "learning_rate, learningrate, step_size, eta",
    "epochs": "num_epochs, n_epochs, max_epochs, num_train_epochs, nb_epochs",
    "max_steps": "num_steps, n_steps, train_steps, max_iterations, iterations",
    "batch_size": "bs, batch, batchsize, train_batch_size, eval_batch_size, per_device_train_batch_size",
    "weight_decay": "wd, l2, l2_reg, l2_emb, decay",
    "schedule": "scheduler, lr_scheduler, lr_scheduler_type, lr_schedule",
    "warmup_steps": "warmup, warm_up, num_warmup_steps, lr_warmup_steps",
    "clip_norm": "clip_grad_norm, max_grad_norm, grad_clip, gradient_clip, gradient_clip_val, clip",
    "accumulate": "accumulation, accumulation_steps, gradient_accumulation_steps, accumulate_grad_batches",
    "optimizer": "optim, optimiser, learner",
    "patience": "early_stopping, early_stop, stopping_step, early_stopping_patience",
    "hidden_size": "hidden_dim, hidden, hidden_units, embedding_size, embedding_dim, emb_size, emb_dim, d_model, dim, width",
    "inner_size": "ffn_dim, feed_forward_size, feedforward_size, intermediate_size, d_ff, dim_feedforward",
    "n_heads": "heads, num_heads, n_head, nhead, num_attention_heads",
    "n_core_layers": "n_layers, num_layers, layers, n_blocks, num_blocks, num_hidden_layers",
    "max_len": "max_seq_length, max_seq_len, maxlen, max_length, seq_len, max_item_list_length, sequence_length",
    "dropout": "dropout_rate, dropout_prob, hidden_dropout_prob, hidden_dropout, p_drop",
    "attention_dropout": "attn_dropout, attn_dropout_prob, attention_probs_dropout_prob",
    "mean_depth": "depth, recurrence, n_recurrence, mean_recurrence, reasoning_steps",
    "tau": "temperature, temp",
    "similarity": "score_function, scoring",
    "ks": "topk, top_k, cutoffs",
    "user": "user_id, user_col, user_column, userid, user_id_field",
    "item": "item_id, item_col, item_column, itemid, item_id_field",
    "time": "timestamp, time_col, time_column, time_field",
    "separator": "sep, delimiter, field_separator, column_separator",
    "min_rating": "threshold, rating_threshold, min_score",
    "min_events": "k_core, kcore, min_user_events, min_user_inter, user_inter_num_interval, min_interactions",
    "min_item_events": "min_item_inter, item_inter_num_interval",
    "duplicates": "dedup, deduplicate, drop_duplicates, rm_dup_inter",
    "path": "file, filename, dataset, data_path, input_file",
    "split": "split_strategy, split_mode",
    "group_size": "num_generations, n_trajectories, group",
    "beta": "kl_coef, kl_weight, kl_beta",
    "seed": "random_seed, random_state, rng_seed, manual_seed",
    "precision": "dtype, amp, fp16, bf16",
    "device": "gpu, gpu_id, cuda, accelerator",
    "output": "out, output_file, outfile",
    "out": "output, output_dir, out_dir, save_dir, checkpoint_dir, run_dir",
}
_SECTIONS = {
    "spt": "phase1, pretraining, pretrain, train, training, trainer, optimizer, optim",
    "rpt": "phase2, posttraining, rl, grpo",
    "evaluation": "eval, test, valid, metrics",
    "data": "dataset, log, columns",
    "model": "net, network, encoder, lares",
}


def _by_word(table: Mapping[str, str]) -> dict[str, str]:
    return {word: name for name, words in table.items() for word in words.split(", ")}


_NAME_OF, _SECTION_OF = _by_word(_SYNONYMS), _by_word(_SECTIONS)


def nearest(key: str, known: Sequence[str]) -> str | None:
    """Return the one of the ``known`` names that ``key`` may stand for, or ``None`` if none is close.

    A name is ``section.name``, or a name alone. Upper case and lower case are equal, and so are ``-`` and ``_``. Of several
    candidates, one in the section of ``key`` goes first, and then the order of ``known`` decides.
    """
    parts = {full: _parts(full) for full in known}
    section, name = _parts(key)
    sections = {each for each, _ in parts.values()}
    if section not in sections:
        section = _SECTION_OF.get(section) or _close(section, sections, 0.7) or ""
    order = sorted(known, key=lambda full: parts[full][0] != section)
    for full in order:
        if parts[full][1] in (name, _NAME_OF.get(name)):
            return full
    own = {parts[full][1]: full for full in reversed(order) if parts[full][0] == section}
    every = {parts[full][1]: full for full in reversed(order)}
    whole = {"_".join(parts[full]): full for full in order}
    for text, names, cutoff in ((name, own, 0.7), (name, every, 0.8), ("_".join(_parts(key)).strip("_"), whole, 0.85)):
        if close := _close(text, names, cutoff):
            return names[close]
    return None


def _parts(key: str) -> tuple[str, str]:
    section, _, name = key.strip().lstrip("-").lower().replace("-", "_").rpartition(".")
    return section, name


def _close(word: str, names: Iterable[str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(names), 1, cutoff)), None)
