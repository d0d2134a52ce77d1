"""Scalar rewards of answers under a reward model: a folder that AutoModelForSequenceClassification loads, with one label."""

import hashlib
from pathlib import Path

import torch
import transformers

from configurator import UserError
from load import check_tokenizer, load_tokenizer


def load_reward_model(folder, device='cpu', trust_remote_code=False):
    """(model in float32 and eval mode, tokenizer) of a reward model folder or hub id. Raises UserError."""
    tokenizer = load_tokenizer(folder, trust_remote_code)
    try:
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # no such folder, no such class, broken weights
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f'cannot load the reward model {folder!r}: {reason}') from None
    missing = sorted(report['missing_keys'])
    if missing:
        raise UserError(
            f'{folder!r} is no reward model: it has no {missing[0]} (a language model? train one with reward.py)'
        )
    if model.config.num_labels != 1:
        raise UserError(f'the reward model {folder!r} has {model.config.num_labels} labels; it must have one scalar')
    check_tokenizer(tokenizer, model, folder)
    return model.to(device).eval(), tokenizer


def content(folder):
    """A hash of a folder's weights and config, so that rewards of two models never mix; None for a hub id."""
    digest = hashlib.sha256()
    for file in sorted([*Path(folder).glob('*.safetensors'), *Path(folder).glob('config.json')]):
        with open(file, 'rb') as stream:
            digest.update(hashlib.file_digest(stream, 'sha256').digest())
    return digest.hexdigest()[:16] if Path(folder).is_dir() else None


@torch.no_grad()
def scores(model, items, max_tokens=16384):
    """The rewards of (prompt ids, answer ids) as a list of floats: the scalar at the last token, the end of text included.

    In batches of similar length, padded, of at most max_tokens tokens, padding and all."""
    rows = [[*prompt, *answer] for prompt, answer in items]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    out = [0.0] * len(rows)
    while order:
        width = len(rows[order[0]])
        now, order = order[: max(1, max_tokens // width)], order[max(1, max_tokens // width) :]
        # transformers takes the scalar at the last token that is not the padding id, which is often the end of text, too:
        # pad with an id that the batch does not have
        used = {token for i in now for token in rows[i]}
        pad = next(token for token in range(model.get_input_embeddings().num_embeddings) if token not in used)
        ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in now], device=model.device)
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in now], device=model.device)
        config = model.config.get_text_config()
        own, config.pad_token_id = config.pad_token_id, pad
        try:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            config.pad_token_id = own
        for i, value in zip(now, logits[:, 0].float().tolist(), strict=True):
            out[i] = value
    return out
