"""A tiny random InternVL folder, written without torch, in the layout of transformers or the original; see `tiny`."""

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

WORDS = 298
SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
VOCABULARY = WORDS + len(SPECIAL)
END_TOKEN_ID, IMAGE_TOKEN_ID = WORDS + 1, WORDS + 4
# The original repository says in conversation.py what transformers' layout says in its chat template.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}"
    "{{ '<IMG_CONTEXT>\\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_internvl(
    folder: str | Path,
    *,
    layout: str = "hf",
    text: str = "qwen3",
    norm: str = "layer_norm",
    tied: bool = False,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 12,
    feature_layer: int = -1,
    image_size: int = 28,
    patch_size: int = 7,
    vision_layers: int = 2,
    text_layers: int = 3,
    max_patches: int = 12,
    max_position_embeddings: int = 2048,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random InternVL folder: config, weights, tokenizer, processor; the same arguments give the same bytes.

    layout: "hf" (as transformers saves by default), "modules" (the names of its modules) or "original".
    text: "qwen3" (InternVL3.5) or "qwen2" (InternVL3, whose config names dynamic rope scaling).
    norm: of the tower. "rms_norm" has norms of queries and keys and no biases of theirs, as the 6B tower does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    width, vision_width, vision_mlp = 32, 24, 40
    decoder = dict(width=width, mlp=48, layers=text_layers, heads=num_heads, kv_heads=num_kv_heads, head_dim=head_dim)

    patches = (image_size // patch_size) ** 2
    tensors = {
        "vision_tower.embeddings.cls_token": 5 * bias(rng, vision_width)[None, None],
        "vision_tower.embeddings.position_embeddings": 0.5 * matrix(rng, 1, patches + 1, vision_width) * vision_width,
        "vision_tower.embeddings.patch_embeddings.projection.weight": matrix(
            rng, vision_width, 3, patch_size, patch_size
        ),
        "vision_tower.embeddings.patch_embeddings.projection.bias": bias(rng, vision_width),
    }
    for i in range(vision_layers):
        layer = vision_layer(rng, vision_width, vision_mlp, norm)
        tensors |= {f"vision_tower.encoder.layer.{i}.{name}": value for name, value in layer.items()}
    for name, size_out, size_in in (("linear_1", width, 4 * vision_width), ("linear_2", width, width)):
        tensors |= linear(rng, f"multi_modal_projector.{name}", size_out, size_in)
    tensors["multi_modal_projector.layer_norm.weight"] = gain(rng, 4 * vision_width)
    tensors["multi_modal_projector.layer_norm.bias"] = bias(rng, 4 * vision_width)
    language = llama_tensors(rng, decoder, VOCABULARY, text)
    tensors |= {"language_model.model." + name: value for name, value in language.items()}
    if not tied:
        tensors["language_model.lm_head.weight"] = matrix(rng, VOCABULARY, width)

    words = dict(
        model_type=text, hidden_size=width, intermediate_size=48, num_hidden_layers=text_layers, hidden_act="silu",
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim, vocab_size=VOCABULARY,
        rms_norm_eps=1e-6, max_position_embeddings=max_position_embeddings, rope_theta=10000.0,
        use_sliding_window=False, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=END_TOKEN_ID,
    )  # fmt: skip
    if text == "qwen2":
        words |= dict(rope_scaling=dict(factor=2.0, rope_type="dynamic", type="dynamic"))
    vision = dict(
        hidden_size=vision_width, intermediate_size=vision_mlp, num_hidden_layers=vision_layers, num_attention_heads=2,
        layer_norm_eps=1e-6, hidden_act="gelu", norm_type=norm,
    )  # fmt: skip
    original = layout == "original"
    options = (norm == "layer_norm", norm == "rms_norm")
    if original:
        vision |= dict(zip(("qkv_bias", "qk_normalization"), options, strict=True))
        config = dict(
            architectures=["InternVLChatModel"], model_type="internvl_chat", llm_config=words, downsample_ratio=0.5,
            vision_config=vision | dict(model_type="intern_vit_6b", image_size=image_size, patch_size=patch_size),
            dynamic_image_size=True, force_image_size=image_size, max_dynamic_patch=max_patches, min_dynamic_patch=1,
            pad2square=False, ps_version="v2", select_layer=feature_layer, template="internvl2_5", use_thumbnail=True,
            torch_dtype=dtype,
        )  # fmt: skip
        tensors = as_original(tensors)
    else:
        vision |= dict(zip(("attention_bias", "use_qk_norm"), options, strict=True))
        sides = dict(image_size=[image_size] * 2, patch_size=[patch_size] * 2)
        config = dict(
            architectures=["InternVLForConditionalGeneration"], model_type="internvl", text_config=words,
            vision_config=vision | dict(model_type="internvl_vision", **sides), image_token_id=IMAGE_TOKEN_ID,
            downsample_ratio=0.5, image_seq_length=patches // 4, vision_feature_layer=feature_layer,
            tie_word_embeddings=tied, dtype=dtype,
        )  # fmt: skip
    if layout == "modules":
        tensors = {as_module(name): value for name, value in tensors.items()}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", dict(eos_token_id=END_TOKEN_ID, pad_token_id=0))
    write_chat_tokenizer(folder)
    write_tile_processor(folder, image_size, max_patches, patches // 4, original)
    write_weights(folder, tensors, dtype)
    return folder


def vision_layer(rng, width, mlp, norm):
    tensors = {"lambda_1": 3 * gain(rng, width), "lambda_2": 0.5 * gain(rng, width)}
    for name in ("layernorm_before", "layernorm_after"):
        tensors |= {f"{name}.weight": gain(rng, width)}
        tensors |= {f"{name}.bias": bias(rng, width)} if norm == "layer_norm" else {}
    for name in ("q", "k", "v"):
        tensors[f"attention.{name}_proj.weight"] = matrix(rng, width, width)
        tensors |= {f"attention.{name}_proj.bias": bias(rng, width)} if norm == "layer_norm" else {}
    if norm == "rms_norm":
        tensors |= {f"attention.{name}_norm.weight": gain(rng, width) for name in ("q", "k")}
    tensors |= linear(rng, "attention.projection_layer", width, width)
    return tensors | linear(rng, "mlp.fc1", mlp, width) | linear(rng, "mlp.fc2", width, mlp)


def as_module(name):
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


ORIGINAL_NAMES = {
    "vision_tower.": "vision_model.",
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "attention.": "attn.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
}


def as_original(tensors):
    """The original's names, and queries, keys and values of the tower in one tensor."""
    renamed, joined = {}, {}
    for name, value in tensors.items():
        if not name.startswith("language_model."):
            for ours, theirs in ORIGINAL_NAMES.items():
                name = name.replace(ours, theirs)
            for part in ("q_proj", "k_proj", "v_proj"):
                if part in name:
                    joined.setdefault(name.replace(part, "qkv"), []).append(value)
                    break
            else:
                renamed[name] = value
        else:
            renamed[name] = value
    return renamed | {name: np.concatenate(parts) for name, parts in joined.items()}


def write_chat_tokenizer(folder):
    """A byte-level BPE without BOS, with the markers of chat and images, and the chat template."""
    tokenizer = byte_level_bpe(WORDS, "Yes No" * 9, ["<|endoftext|>"])
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        model_max_length=2048, clean_up_tokenization_spaces=False, processor_class="InternVLProcessor",
        extra_special_tokens=dict(start_image_token="<img>", end_image_token="</img>",
                                  context_image_token="<IMG_CONTEXT>", video_token="<video>"),
    ))  # fmt: skip
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_tile_processor(folder, side, max_patches, tokens, original):
    """HF's; or what the original folders have, which does not cut tiles: their code does."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    if original:
        write_json(folder / "preprocessor_config.json", dict(
            feature_extractor_type="CLIPFeatureExtractor", crop_size=side, do_center_crop=True, size=side,
            do_resize=True, do_normalize=True, image_mean=mean, image_std=std, resample=3,
        ))  # fmt: skip
        return
    write_preprocessor(
        folder, image_processor_type="GotOcr2ImageProcessorFast", size=dict(height=side, width=side), image_mean=mean,
        image_std=std, crop_to_patches=False, min_patches=1, max_patches=max_patches,
    )  # fmt: skip
    write_json(folder / "processor_config.json", dict(processor_class="InternVLProcessor", image_seq_length=tokens))
