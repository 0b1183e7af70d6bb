"""Tiny random Qwen2.5-VL and Qwen2-VL folders, written without torch; see `tiny`."""

from pathlib import Path

import numpy as np
from tiny import (
    bias,
    byte_level_bpe,
    gain,
    linear,
    llama_tensors,
    matrix,
    write_json,
    write_preprocessor,
    write_weights,
)

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
WORDS = 297
VOCABULARY = WORDS + len(SPECIAL)
END, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = range(WORDS, VOCABULARY)

# What Qwen/Qwen2.5-VL-7B-Instruct renders, without its options for videos and picture numbers.
CHAT_TEMPLATE = """{% for message in messages -%}
{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif -%}
<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}{% else -%}
{% for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif -%}
{% endfor -%}{% endif -%}<|im_end|>
{% endfor -%}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"""


def tiny_qwen(
    folder: str | Path,
    *,
    kind: str = "qwen2_5_vl",
    published: bool = True,
    tied: bool = False,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    sections: tuple[int, int, int] = (2, 3, 3),
    text_layers: int = 3,
    patch_size: int = 14,
    window_size: int = 56,
    vision_layers: int = 4,
    full_layers: tuple[int, ...] = (1, 3),
    vision_heads: int = 2,
    pixels: tuple[int, int] = (4 * 28**2, 64 * 28**2),
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Write a random folder: config, weights, tokenizer, processor, chat template; same arguments, same bytes.

    kind: "qwen2_5_vl" or "qwen2_vl".
    published: config and names as on the hub (text options at the top, `visual.`), else those of transformers' modules.
    pixels: the fewest and the most to which the processor resizes; spelled in the old way where `published`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    gated, width, vision_width, vision_mlp = kind == "qwen2_5_vl", num_heads * head_dim, 16 * vision_heads, 36
    vision_mlp = vision_mlp if gated else 2 * vision_width
    sizes = dict(width=width, mlp=48, layers=text_layers, heads=num_heads, kv_heads=num_kv_heads, head_dim=head_dim)
    tower = vision_tensors(rng, gated, vision_layers, vision_width, vision_mlp, patch_size, width)
    language = llama_tensors(rng, sizes, VOCABULARY, "qwen2")
    visual, model = ("visual.", "model.") if published else ("model.visual.", "model.language_model.")
    tensors = {visual + name: value for name, value in tower.items()}
    tensors |= {model + name: value for name, value in language.items()}
    if not tied:
        tensors["lm_head.weight"] = matrix(rng, VOCABULARY, width)

    text = dict(
        hidden_size=width, intermediate_size=48, num_hidden_layers=text_layers, num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads, vocab_size=VOCABULARY, hidden_act="silu", rms_norm_eps=1e-6,
        max_position_embeddings=2048, use_sliding_window=False, sliding_window=1024, max_window_layers=2,
    )  # fmt: skip
    vision = dict(
        depth=vision_layers, hidden_act="silu", intermediate_size=vision_mlp, hidden_size=vision_width,
        out_hidden_size=width, window_size=window_size, fullatt_block_indexes=list(full_layers),
    ) if gated else dict(
        depth=vision_layers, hidden_act="quick_gelu", mlp_ratio=2, embed_dim=vision_width, hidden_size=width,
    )  # fmt: skip
    vision |= dict(num_heads=vision_heads, patch_size=patch_size, spatial_merge_size=2, temporal_patch_size=2)
    architecture = "Qwen2_5_VLForConditionalGeneration" if gated else "Qwen2VLForConditionalGeneration"
    config = dict(
        architectures=[architecture], model_type=kind, image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=tied,
        bos_token_id=END, eos_token_id=IM_END,
    )  # fmt: skip
    if published:
        rope = dict(rope_theta=10000.0, rope_scaling=dict(type="mrope", mrope_section=list(sections)))
        config |= text | rope | dict(vision_config=vision | dict(model_type=kind, in_chans=3), torch_dtype=dtype)
    else:
        rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=list(sections))
        text |= dict(model_type=f"{kind}_text", rope_parameters=rope)
        config |= dict(text_config=text, vision_config=vision | dict(model_type=f"{kind}_vision"), dtype=dtype)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", dict(eos_token_id=[IM_END, END], pad_token_id=END))
    write_qwen_tokenizer(folder)
    write_qwen_processor(folder, patch_size, pixels, old=published)
    write_weights(folder, tensors, dtype, shards)
    return folder


def vision_tensors(rng, gated, layers, width, mlp, patch, out):
    def norm(name):
        return {f"{name}.weight": gain(rng, width)} | ({} if gated else {f"{name}.bias": bias(rng, width)})

    tensors = {"patch_embed.proj.weight": matrix(rng, width, 3, 2, patch, patch)}
    for i in range(layers):
        at = f"blocks.{i}."
        tensors |= norm(at + "norm1") | norm(at + "norm2")
        tensors |= linear(rng, at + "attn.qkv", 3 * width, width) | linear(rng, at + "attn.proj", width, width)
        if gated:
            tensors |= linear(rng, at + "mlp.gate_proj", mlp, width) | linear(rng, at + "mlp.up_proj", mlp, width)
            tensors |= linear(rng, at + "mlp.down_proj", width, mlp)
        else:
            tensors |= linear(rng, at + "mlp.fc1", mlp, width) | linear(rng, at + "mlp.fc2", width, mlp)
    tensors |= norm("merger.ln_q")
    return tensors | linear(rng, "merger.mlp.0", 4 * width, 4 * width) | linear(rng, "merger.mlp.2", out, 4 * width)


def write_qwen_tokenizer(folder, processor="Qwen2_5_VLProcessor", chat_template=CHAT_TEMPLATE):
    """A byte-level BPE of 297 words (any text round-trips) that prepends nothing; then Qwen's special tokens."""
    folder = Path(folder)
    tokenizer = byte_level_bpe(WORDS, "Yes No " * 9)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        model_max_length=2048, clean_up_tokenization_spaces=False, processor_class=processor,
    ))  # fmt: skip
    (folder / "chat_template.jinja").write_text(chat_template)


def write_qwen_processor(folder, patch_size, pixels, old=False, kind="Qwen2VLImageProcessor"):
    """old: the limits of an image's area spelled as in the published checkpoints of Qwen2.5-VL."""
    fewest, most = pixels
    limits = dict(min_pixels=fewest, max_pixels=most)
    limits = limits if old else dict(size=dict(shortest_edge=fewest, longest_edge=most))
    write_preprocessor(
        folder, image_processor_type=kind, patch_size=patch_size, merge_size=2, temporal_patch_size=2,
        processor_class="Qwen2_5_VLProcessor", **limits,
    )  # fmt: skip
