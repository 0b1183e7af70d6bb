"""A tiny random BLIP image-text retrieval folder, written without torch; see `tiny`."""

from pathlib import Path

import numpy as np
from tiny import bias, linear, matrix, norm, write_json, write_preprocessor, write_weights

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = "a is the of on in there what which to left right red blue square cross plate image sign small ? ,".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
VOCABULARY = (*SPECIAL, *WORDS, *(c for c in LETTERS if c not in WORDS), *(f"##{c}" for c in LETTERS))


def tiny_blip(
    folder: str | Path,
    *,
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
    image_size: int = 32,
    patch_size: int = 8,
    vision_layers: int = 2,
    vision_width: int = 16,
    text_layers: int = 3,
    width: int = 24,
    num_heads: int = 3,
    position_ids: bool = False,
) -> Path:
    """Write a random BLIP folder: config, weights, tokenizer, image processor; the same arguments give the same bytes.

    position_ids: store the buffer that transformers 4 stored.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = vision_tensors(rng, image_size, patch_size, vision_layers, vision_width)
    tensors |= text_tensors(rng, text_layers, width, vision_width)
    tensors |= linear(rng, "itm_head", 2, width)
    tensors |= linear(rng, "vision_proj", 12, vision_width) | linear(rng, "text_proj", 12, width)
    if position_ids:
        tensors["text_encoder.embeddings.position_ids"] = np.arange(40, dtype=np.float32)[None]
    config = dict(
        architectures=["BlipForImageTextRetrieval"], model_type="blip", image_text_hidden_size=12, dtype=dtype,
        text_config=dict(
            model_type="blip_text_model", vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=40,
            encoder_hidden_size=vision_width, num_hidden_layers=text_layers, num_attention_heads=num_heads,
            max_position_embeddings=40, hidden_act="gelu", layer_norm_eps=1e-12, is_decoder=True,
        ),
        vision_config=dict(
            model_type="blip_vision_model", hidden_size=vision_width, intermediate_size=20,
            num_hidden_layers=vision_layers, num_attention_heads=2, image_size=image_size, patch_size=patch_size,
            hidden_act="gelu", layer_norm_eps=1e-5,
        ),
    )  # fmt: skip
    write_json(folder / "config.json", config)
    write_bert_tokenizer(folder)
    write_blip_processor(folder, image_size)
    write_weights(folder, tensors, dtype, shards)
    return folder


def vision_tensors(rng, image_size, patch_size, layers, width):
    prefix = "vision_model."
    tensors = {
        prefix + "embeddings.class_embedding": bias(rng, width)[None, None] * 5,
        prefix + "embeddings.position_embedding": 0.5 * matrix(rng, 1, (image_size // patch_size) ** 2 + 1, width),
        prefix + "embeddings.patch_embedding.weight": matrix(rng, width, 3, patch_size, patch_size),
        prefix + "embeddings.patch_embedding.bias": bias(rng, width),
    } | norm(rng, prefix + "post_layernorm", width)
    for i in range(layers):
        layer = f"{prefix}encoder.layers.{i}."
        tensors |= linear(rng, layer + "self_attn.qkv", 3 * width, width)
        tensors |= linear(rng, layer + "self_attn.projection", width, width)
        tensors |= norm(rng, layer + "layer_norm1", width) | norm(rng, layer + "layer_norm2", width)
        tensors |= linear(rng, layer + "mlp.fc1", 20, width) | linear(rng, layer + "mlp.fc2", width, 20)
    return tensors


def text_tensors(rng, layers, width, vision_width):
    prefix = "text_encoder."
    tensors = {
        prefix + "embeddings.word_embeddings.weight": matrix(rng, len(VOCABULARY), width),
        prefix + "embeddings.position_embeddings.weight": matrix(rng, 40, width),
    } | norm(rng, prefix + "embeddings.LayerNorm", width)
    for i in range(layers):
        layer = f"{prefix}encoder.layer.{i}."
        for kind, size_in in (("attention", width), ("crossattention", vision_width)):
            tensors |= linear(rng, f"{layer}{kind}.self.query", width, width)
            tensors |= linear(rng, f"{layer}{kind}.self.key", width, size_in)
            tensors |= linear(rng, f"{layer}{kind}.self.value", width, size_in)
            tensors |= linear(rng, f"{layer}{kind}.output.dense", width, width)
            tensors |= norm(rng, f"{layer}{kind}.output.LayerNorm", width)
        tensors |= linear(rng, layer + "intermediate.dense", 40, width)
        tensors |= linear(rng, layer + "output.dense", width, 40) | norm(rng, layer + "output.LayerNorm", width)
    return tensors


def write_bert_tokenizer(folder):
    """A WordPiece tokenizer of a few words, and of letters for all others, as BERT's: [CLS] text [SEP]."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    folder = Path(folder)
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="BertTokenizer", do_lower_case=True, model_max_length=40, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    ))  # fmt: skip


def write_blip_processor(folder, image_size):
    write_preprocessor(
        folder, image_processor_type="BlipImageProcessor", size={"height": image_size, "width": image_size}
    )
