"""A tiny random InstructBLIP folder, written without torch; see `tiny`."""

from pathlib import Path

import numpy as np
from tiny import (
    IMAGE_TOKEN_ID,
    PAD_TOKEN,
    PAD_TOKEN_ID,
    VOCABULARY,
    linear,
    llama_tensors,
    matrix,
    norm,
    write_json,
    write_tokenizer,
    write_weights,
)
from tiny_blip import VOCABULARY as WORDS
from tiny_blip import vision_tensors, write_bert_tokenizer, write_blip_processor

MLP = 20
"""Of the vision tower and the Q-Former."""


def tiny_instructblip(
    folder: str | Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    image_size: int = 24,
    patch_size: int = 8,
    vision_layers: int = 2,
    vision_width: int = 16,
    qformer_layers: int = 4,
    qformer_width: int = 24,
    every: int = 2,
    num_queries: int = 6,
    text_layers: int = 3,
    width: int = 32,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    tied: bool = False,
    max_position_embeddings: int = 2048,
    question_tokens: int = 40,
) -> Path:
    """Write a random InstructBLIP folder: config, weights, both tokenizers, processor; same arguments, same bytes.

    every: layers of the Q-Former from one cross-attention to the next.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    text = dict(width=width, mlp=48, layers=text_layers, heads=num_heads, kv_heads=num_kv_heads,
                head_dim=width // num_heads)  # fmt: skip
    tensors = vision_tensors(rng, image_size, patch_size, vision_layers, vision_width)
    tensors |= {"query_tokens": matrix(rng, 1, num_queries, qformer_width) * 5}
    tensors |= qformer_tensors(rng, qformer_layers, qformer_width, vision_width, every, question_tokens)
    tensors |= linear(rng, "language_projection", width, qformer_width)
    language = llama_tensors(rng, text, VOCABULARY)
    tensors |= {"language_model.model." + name: value for name, value in language.items()}
    if not tied:
        tensors["language_model.lm_head.weight"] = matrix(rng, VOCABULARY, width)

    write_json(folder / "config.json", dict(
        architectures=["InstructBlipForConditionalGeneration"], model_type="instructblip", dtype=dtype,
        image_token_index=IMAGE_TOKEN_ID, num_query_tokens=num_queries, tie_word_embeddings=tied,
        vision_config=dict(
            model_type="instructblip_vision_model", hidden_size=vision_width, intermediate_size=MLP,
            num_hidden_layers=vision_layers, num_attention_heads=2, image_size=image_size, patch_size=patch_size,
            hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True,
        ),
        qformer_config=dict(
            model_type="instructblip_qformer", hidden_size=qformer_width, intermediate_size=MLP,
            num_hidden_layers=qformer_layers, num_attention_heads=3, vocab_size=len(WORDS), hidden_act="gelu",
            max_position_embeddings=question_tokens, layer_norm_eps=1e-12, cross_attention_frequency=every,
            encoder_hidden_size=vision_width,
        ),
        text_config=dict(
            model_type="llama", hidden_size=width, intermediate_size=text["mlp"], num_hidden_layers=text_layers,
            num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=width // num_heads,
            vocab_size=VOCABULARY, hidden_act="silu", rms_norm_eps=1e-6, attention_bias=False, mlp_bias=False,
            max_position_embeddings=max_position_embeddings, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
            pad_token_id=PAD_TOKEN_ID, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        ),
    ))  # fmt: skip
    write_json(folder / "generation_config.json", dict(bos_token_id=1, eos_token_id=2, pad_token_id=PAD_TOKEN_ID))
    write_tokenizer(folder)
    # As published: <image> is an added token, but the tokenizer has no name for it.
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token=PAD_TOKEN, model_max_length=2048, clean_up_tokenization_spaces=False,
        processor_class="InstructBlipProcessor",
    ))  # fmt: skip
    (folder / "qformer_tokenizer").mkdir(exist_ok=True)
    write_bert_tokenizer(folder / "qformer_tokenizer")
    write_blip_processor(folder, image_size)
    write_json(folder / "processor_config.json", dict(
        processor_class="InstructBlipProcessor", num_query_tokens=num_queries,
    ))  # fmt: skip
    write_weights(folder, tensors, dtype)
    return folder


def qformer_tensors(rng, layers, width, vision_width, every, question_tokens):
    prefix = "qformer."
    tensors = {
        prefix + "embeddings.word_embeddings.weight": matrix(rng, len(WORDS), width) * 3,
        prefix + "embeddings.position_embeddings.weight": matrix(rng, question_tokens, width) * 3,
    } | norm(rng, prefix + "embeddings.layernorm", width)
    for i in range(layers):
        layer = f"{prefix}encoder.layer.{i}."
        kinds = {"attention": width} | ({"crossattention": vision_width} if i % every == 0 else {})
        for kind, size_in in kinds.items():
            tensors |= linear(rng, f"{layer}{kind}.attention.query", width, width)
            tensors |= linear(rng, f"{layer}{kind}.attention.key", width, size_in)
            tensors |= linear(rng, f"{layer}{kind}.attention.value", width, size_in)
            tensors |= linear(rng, f"{layer}{kind}.output.dense", width, width)
            tensors |= norm(rng, f"{layer}{kind}.output.LayerNorm", width)
        for kind in ("", "_query"):
            tensors |= linear(rng, f"{layer}intermediate{kind}.dense", MLP, width)
            tensors |= linear(rng, f"{layer}output{kind}.dense", width, MLP)
            tensors |= norm(rng, f"{layer}output{kind}.LayerNorm", width)
    return tensors
