"""InstructBLIP against HF transformers: tower, Q-Former, decoder, their attentions, gradients and CoF's key bias.

Folders are written by `tiny_instructblip` and read by both. If a case fails here and nowhere else, look at the first
layer in the report: everything after it is only a consequence.
"""

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import ROWS_TOLERANCE, TOLERANCE, Reference, assert_parity
from tiny import IMAGE_TOKEN_ID
from tiny_instructblip import tiny_instructblip

from jaxvqa.convert import load
from jaxvqa.models import instructblip, qformer
from jaxvqa.models.instructblip import Asked, InstructBlipConfig
from jaxvqa.prompts import render, tokenise
from jaxvqa.taps import Edit, ReadSpec, Tap, Taps
from jaxvqa.transforms import attention_gradient, log_reweight
from jaxvqa.vision import eva

pytestmark = pytest.mark.parity

CASES = {
    "every-second-3x3": {},
    "every-third-tied-5x5": dict(
        every=3, qformer_layers=5, image_size=40, num_queries=5, num_kv_heads=2, tied=True, vision_layers=3
    ),
}
LENGTHS, IMAGES = (540, 521, 505), (2, 1, 0)
"""Above 500 tokens, where a fault of the rotary embedding shows; the last row is text alone."""
QUESTIONS = (
    "Question: What is on the small sign, left of the red cross? Short answer:",
    "Question: Is it red? Short answer:",
    "",
)
FORCED = 32
GRADIENT_TOLERANCE = 1e-4
"""Relative to the largest gradient."""


@dataclass(frozen=True, eq=False)
class Case:
    model: Any
    processor: Any
    """HF's."""
    config: InstructBlipConfig
    params: Any
    batch: tuple[Any, ...]
    """Ours: ids, lengths, pixels [B, I, E, E, 3], slots, asked."""
    images: dict[str, Any]
    """HF's: pixel values [M, 3, E, E], and the Q-Former's ids and mask, once per image."""

    @functools.cached_property
    def reference(self) -> Reference:
        return self.run("right", attentions=True)

    def run(self, side: str, attentions: bool = False) -> Reference:
        ids, lengths, *_ = self.batch
        return reference.run(self.language, ids, lengths, side=side, attentions=attentions, **self.images)

    def language(self, **inputs) -> SimpleNamespace:
        """HF's whole model, its results named as those of other families."""
        out = self.model(**inputs)
        said = out.language_model_outputs
        tokens = self.model.language_projection(out.qformer_outputs[0][:, : self.config.image_tokens])
        return SimpleNamespace(
            logits=out.logits, hidden_states=said.hidden_states, attentions=said.attentions, image_hidden_states=tokens
        )


@pytest.fixture(scope="session")
def case_of(tmp_path_factory):
    """case_of(name): a folder loaded by both sides, with its inputs, made once."""

    @functools.cache
    def make(name: str) -> Case:
        import torch
        from transformers import AutoProcessor, InstructBlipForConditionalGeneration

        torch.set_num_threads(1)
        folder = tiny_instructblip(tmp_path_factory.mktemp(name), **CASES[name], seed=list(CASES).index(name))
        model = InstructBlipForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        config, params, _ = load(folder, dtype="float32")

        side, pictures = config.vision.image_size, iter(reference.pictures())
        pixels = np.zeros((len(IMAGES), max(IMAGES), side, side, 3), np.float32)
        theirs, owners = [], []
        for row, count in enumerate(IMAGES):
            for i in range(count):
                picture = next(pictures)
                pixels[row, i] = instructblip.process(config, processor.image_processor, picture, (1,)).arrays
                theirs.append(processor.image_processor(picture, return_tensors="pt")["pixel_values"])
                owners.append(row)
        texts = processor.qformer_tokenizer([QUESTIONS[row] for row in owners], padding=True, return_tensors="pt")
        ids = reference.prompts(config.image_tokens, LENGTHS, IMAGES)
        is_image = ids == IMAGE_TOKEN_ID
        slots = np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1).astype(np.int32)
        asked = [instructblip.ask(config, processor.qformer_tokenizer, text) for text in QUESTIONS]
        counts = np.array([len(a) for a in asked], np.int32)
        asked = Asked(np.stack([np.pad(a, (0, counts.max() - len(a))) for a in asked]), counts)
        batch = (ids, np.array(LENGTHS, np.int32), pixels, slots, asked)
        images = dict(
            pixel_values=torch.cat(theirs),
            qformer_input_ids=texts["input_ids"],
            qformer_attention_mask=texts["attention_mask"],
        )
        return Case(model, processor, config, params, batch, images)

    return make


@pytest.fixture(params=CASES)
def case(request, case_of) -> Case:
    return case_of(request.param)


ROWS = np.array([[539, 500, 300, 41], [520, 333, 60, 2], [504, 400, 100, 17]], np.int32)
SPEC = ReadSpec(layers=(0, 1, 2), read=frozenset({"hidden", "rows", "values"}), heads="all")
CROSS = ReadSpec(layers=(0, 1), read=frozenset({"rows", "values"}), heads="all")
"""Every cross-attention of both cases."""


def encoded(params, config, pixels):
    """Features [B, I·S, Dv] of pixels [B, I, E, E, 3]."""
    features = instructblip.encode_images(params, config, jax.lax.collapse(pixels, 0, 2))
    return features.reshape(len(pixels), -1, features.shape[-1])


@jax.jit
def by_layer(params, config, batch, bias):
    """Hidden states [M, ..] of the tower and of the Q-Former after each layer, padding included."""
    _, _, pixels, _, asked = batch
    flat, images = jax.lax.collapse(pixels, 0, 2), pixels.shape[1]
    c, q, depth = config.vision, config.qformer, config.vision.num_layers
    states = instructblip.encode_images(params, config, flat)
    each = Asked(*(jnp.repeat(x, images, axis=0) for x in (asked.ids, asked.lengths)))
    bias = bias.reshape(len(flat), 1, -1)
    return (
        {"image": states}
        | {f"vision {i}": eva.encode(params.vision, c, flat, stop=i) for i in range(depth + 1)}
        | {
            f"qformer {i}": qformer.run(params.qformer, q, each, states, bias=bias, stop=i)[0]
            for i in range(q.num_layers + 1)
        }
    )


@jax.jit
def ours(params, config, batch, bias):
    """Cross-attention and tokens of images [M, ..], padding included; hidden states, logits and rows [B, ..]."""
    ids, lengths, pixels, slots, asked = batch
    images = jax.lax.collapse(pixels, 0, 2).shape[0]
    features = encoded(params, config, pixels)
    tokens, _ = instructblip.query_images(params, config, features, asked, bias=bias)
    out = instructblip.prefill(
        params, config, ids, lengths, features, slots, asked=asked, bias=bias, cross=CROSS,
        taps=Taps(rows=jnp.asarray(ROWS)), spec=SPEC,
    )  # fmt: skip
    hidden, logits = reference.finished(params, config, out.readouts.hidden)
    cross = out.readouts.cross
    return {f"hidden {i}": h for i, h in enumerate(hidden)} | {
        "projector": tokens.reshape(images, -1, tokens.shape[-1]),
        "cross": jnp.moveaxis(cross.reshape(len(cross), images, *cross.shape[3:]), 0, 1),
        "logits": logits,
        "last": out.logits,
        "rows": out.readouts.rows,
    }


def theirs(case: Case, language: Reference) -> dict[str, np.ndarray]:
    """HF's: of the real images [M, ..], of rows [B, T, ..]."""
    import torch

    model, images, Q = case.model, case.images, case.config.image_tokens
    mask = torch.cat([torch.ones(len(images["qformer_input_ids"]), Q), images["qformer_attention_mask"]], dim=1)
    with torch.no_grad():
        seen = model.vision_model(images["pixel_values"], output_hidden_states=True)
        asked = model.qformer(
            input_ids=images["qformer_input_ids"], attention_mask=mask.long(),
            query_embeds=model.query_tokens.expand(len(mask), -1, -1), encoder_hidden_states=seen.last_hidden_state,
            encoder_attention_mask=torch.ones(seen.last_hidden_state.shape[:2]).long(),
            output_hidden_states=True, output_attentions=True,
        )  # fmt: skip
    found = {f"vision {i}": x.numpy() for i, x in enumerate(seen.hidden_states)}
    found |= {f"qformer {i}": x.numpy() for i, x in enumerate(asked.hidden_states)}
    found |= {f"hidden {i}": x for i, x in enumerate(language.hidden)}
    found |= {
        "image": seen.last_hidden_state.numpy(),
        "projector": language.features,
        "cross": np.stack([x.numpy() for x in asked.cross_attentions], axis=1),
        "logits": language.logits,
        "last": np.stack([x[n - 1] for x, n in zip(language.logits, LENGTHS, strict=True)]),
    }
    if language.attentions is not None:
        found["rows"] = np.take_along_axis(language.attentions, ROWS[None, :, None, :, None], axis=3)
    return found


def deviations(case: Case, expected, programs=(ours,), **mutation) -> dict[str, float]:
    """Largest absolute difference of every array that the programs give, over real images and valid tokens."""
    ids, lengths, _, _, asked = case.batch
    none = jnp.zeros((len(IMAGES), max(IMAGES), 1, case.config.image_states))
    given = dict(params=case.params, config=case.config, batch=case.batch, bias=none) | mutation
    got = {name: x for program in programs for name, x in program(**given).items()}
    real = (np.arange(max(IMAGES)) < np.array(IMAGES)[:, None]).ravel()
    valid = np.arange(ids.shape[1]) < lengths[:, None]
    texts = np.repeat(asked.lengths, IMAGES)[:, None]
    read = np.arange(case.config.image_tokens + asked.ids.shape[1]) < case.config.image_tokens + texts
    found = {}
    for name in got.keys() & expected.keys():
        a, b, kind = np.asarray(got[name]), expected[name], name.split()[0]
        if kind in ("vision", "qformer", "image", "projector", "cross"):
            a = a[real]
        if kind in ("qformer", "hidden", "logits"):
            at = read if kind == "qformer" else valid
            a, b = a[at], b[at]
        found[name] = float(np.abs(a - b).max())
    return found


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_layer_and_the_logits_match_hf(case, side, request, measured):
    """Two images beside one and none, texts of three lengths, above 500 tokens."""
    language = case.reference if side == "right" else case.run("left")
    expected = theirs(case, language)
    found = deviations(case, expected, (by_layer, ours))
    assert found.keys() == expected.keys()
    for name, d in found.items():
        measured(f"instructblip {request.node.callspec.id}: {name}", d)
    assert_parity(found)


def with_layers(case: Case, change) -> Any:
    params = case.params
    return replace(params, qformer=replace(params.qformer, layers=tuple(map(change, params.qformer.layers))))


def everywhere(case: Case) -> dict[str, Any]:
    """Cross-attention in every layer: those without have that of the first."""
    first = case.params.qformer.layers[0].cross
    return dict(
        params=with_layers(case, lambda w: replace(w, cross=w.cross or first)),
        config=replace(case.config, qformer=replace(case.config.qformer, every=1)),
    )


def without_class_token(case: Case) -> dict[str, Any]:
    bias = np.zeros((len(IMAGES), max(IMAGES), 1, case.config.image_states), np.float32)
    bias[..., 0] = -1e9
    return dict(bias=jnp.asarray(bias))


def asked_for(case: Case, lengths) -> dict[str, Any]:
    *rest, asked = case.batch
    return dict(batch=(*rest, replace(asked, lengths=lengths)))


def swapped(case: Case) -> dict[str, Any]:
    ids, lengths, pixels, *rest = case.batch
    return dict(batch=(ids, lengths, pixels[:, ::-1], *rest))


MUTATIONS = {
    "Q-Former text dropped": lambda c: asked_for(c, np.zeros(len(LENGTHS), np.int32)),
    "Q-Former text's padding seen": lambda c: asked_for(c, np.full(len(LENGTHS), c.batch[-1].ids.shape[1], np.int32)),
    "cross-attention in every layer": everywhere,
    "class token dropped": without_class_token,
    "swapped image order": swapped,
    "one network for queries and text": lambda c: dict(params=with_layers(c, lambda w: replace(w, query=w.text))),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_breaks_parity(case_of, name, measured):
    """Faults of a port that leave every shape as it is; a parity test that survives one of them proves nothing."""
    case = case_of("every-second-3x3")
    found = deviations(case, theirs(case, case.reference), **MUTATIONS[name](case))
    for quantity in ("projector", "logits"):
        measured(f"mutation {name}: {quantity}", found[quantity])
        assert found[quantity] > 10 * TOLERANCE


@jax.jit
def forced(params, config, batch):
    """Logits [B, FORCED, V] of the last FORCED tokens, run on a cache one by one, and all at once."""
    ids, lengths, pixels, slots, asked = batch
    start, features = lengths - FORCED, encoded(params, config, pixels)
    out = instructblip.prefill(params, config, ids, start, features, slots, asked=asked, capacity=ids.shape[1] + FORCED)
    return reference.forced(instructblip, params, config, ids, start, out.cache, FORCED)


def test_teacher_forced_tokens_on_a_cache_match_hf(case, request, measured):
    """Prefill and 32 further tokens per row, each row from its own length, against HF's one full forward pass."""
    name = f"instructblip teacher-forced {request.node.callspec.id}"
    got = forced(case.params, case.config, case.batch)
    reference.assert_forced(got, case.reference.logits, LENGTHS, measured, name)


def test_the_key_bias_of_cof_matches_hf(case_of, monkeypatch, measured):
    """λ = 22 on boxes of the images, in every cross-attention, head and query; 0 for the class token."""
    import torch
    from transformers.models.instructblip import modeling_instructblip as hf

    case = case_of("every-third-tied-5x5")
    masks = np.random.default_rng(3).integers(0, 2, (len(IMAGES), max(IMAGES), *case.config.grid))
    flat = np.asarray(log_reweight(masks.astype(np.float32), 22.0)).reshape(*masks.shape[:2], 1, -1)
    bias = np.pad(flat, ((0, 0),) * 3 + ((1, 0),))
    of_images = torch.tensor(np.concatenate([b[:n] for b, n in zip(bias, IMAGES, strict=True)]))[:, None]
    modules = {
        layer.crossattention.attention for layer in case.model.qformer.encoder.layer if layer.has_cross_attention
    }
    eager = hf.eager_attention_forward

    def biased(module, query, key, value, attention_mask, **kwargs):
        return eager(module, query, key, value, of_images if module in modules else attention_mask, **kwargs)

    monkeypatch.setattr(hf, "eager_attention_forward", biased)
    expected = theirs(case, case.run("right", attentions=True))
    found = deviations(case, expected, (by_layer, ours), bias=jnp.asarray(bias))
    measured("CoF bias on cross-attentions: logits", found["logits"])
    assert_parity(found)
    effect = np.abs(expected["projector"] - case.reference.features).max()
    measured("CoF bias on cross-attentions: its effect on the image's tokens", effect)
    assert effect > 100 * TOLERANCE


@jax.jit
def gradients(params, config, batch):
    """(A, ∂y/∂A) of the decoder [L, B, N, R, S] and of the cross-attentions [C, B, I, N, Q, S]; y = Σ log p(top)."""
    ids, lengths, pixels, slots, asked = batch
    features = encoded(params, config, pixels)
    d, q = config.decoder, config.qformer
    B, images = pixels.shape[:2]
    zeros = (
        jnp.zeros((d.num_layers, B, ROWS.shape[1], d.num_heads, d.head_dim)),
        jnp.zeros((len(CROSS.layers), B, images, q.num_queries, q.num_heads, q.width // q.num_heads)),
    )

    def top(perturb):
        taps = Taps((Edit(Tap(perturb=perturb[0]), 0, d.num_layers),), jnp.asarray(ROWS))
        out = instructblip.prefill(
            params, config, ids, lengths, features, slots, asked=asked, perturb=perturb[1], cross=CROSS, taps=taps,
            spec=SPEC,
        )  # fmt: skip
        return jax.nn.log_softmax(out.logits).max(axis=-1).sum(), out.readouts

    slopes, read = jax.grad(top, has_aux=True)(zeros)
    return (
        (read.rows, attention_gradient(slopes[0], read.values)),
        (read.cross, attention_gradient(slopes[1], read.cross_values)),
    )


def autograd(case: Case):
    """The same by torch: (A, ∂y/∂A) of the decoder [L, B, N, T, T] and of the cross-attentions [C, M, N, Q, S]."""
    import torch

    crossed = []

    def keep(module, args, result):
        result[1].retain_grad()
        crossed.append(result[1])

    layers = [layer for layer in case.model.qformer.encoder.layer if layer.has_cross_attention]
    handles = [layer.crossattention.attention.register_forward_hook(keep) for layer in layers]
    ids, mask = reference.pad(case.batch[0], case.batch[1], "right")
    out = case.model(input_ids=ids, attention_mask=mask, output_attentions=True, **case.images)
    for handle in handles:
        handle.remove()
    probs = out.language_model_outputs.attentions
    for p in probs:
        p.retain_grad()
    last = out.logits[torch.arange(len(ids)), mask.sum(1) - 1]
    case.model.zero_grad()
    torch.log_softmax(last, dim=-1).max(dim=-1).values.sum().backward()
    return tuple(
        tuple(np.stack([x.detach().numpy() for x in xs]) for xs in zip(*((a, a.grad) for a in of), strict=True))
        for of in (probs, crossed)
    )


def test_both_gradients_match_torch_autograd(case, request, measured):
    """∂ log p(top next token) / ∂A, of the decoder's rows and of every cross-attention, in one backward pass."""
    (probs, slopes), (cross, cross_slopes) = (tuple(map(np.asarray, pair)) for pair in gradients(
        case.params, case.config, case.batch
    ))  # fmt: skip
    (their_probs, their_slopes), (their_cross, their_cross_slopes) = autograd(case)
    real = np.arange(max(IMAGES)) < np.array(IMAGES)[:, None]
    seen = np.arange(probs.shape[-1]) <= ROWS[:, :, None]

    def at_rows(x):
        return np.take_along_axis(x, ROWS[None, :, None, :, None], axis=3)

    np.testing.assert_allclose(probs, at_rows(their_probs), atol=ROWS_TOLERANCE)
    np.testing.assert_allclose(cross[:, real], their_cross, atol=ROWS_TOLERANCE)
    for what, got, expected in (
        ("decoder", slopes * seen[None, :, None], at_rows(their_slopes) * seen[None, :, None]),
        ("cross-attention", cross_slopes[:, real], their_cross_slopes),
    ):
        d = np.abs(got - expected).max() / np.abs(expected).max()
        measured(f"gradient to {what} against torch, {request.node.callspec.id}", d)
        assert d <= GRADIENT_TOLERANCE and np.abs(expected).max() > 1e-3
    assert not cross_slopes[:, ~real].any(), "images that are not there"


def test_pixels_and_both_texts_match_the_hf_processor(case):
    """One image through HF's processor; it has no two-image prompts, ViCrop's have the queries of both first."""
    config, processor = case.config, case.processor
    for picture, question in zip(reference.pictures(), ("Is it red?", "What is on the plate?"), strict=False):
        prompt = render("instructblip", question)
        theirs = processor(images=picture, text=prompt.text.replace("<image>", ""), return_tensors="np")
        ours = instructblip.process(config, processor.image_processor, picture, (1,))
        np.testing.assert_array_equal(ours.arrays, theirs["pixel_values"][0].transpose(1, 2, 0))
        text = f"Question: {question} Short answer:"
        np.testing.assert_array_equal(
            instructblip.ask(config, processor.qformer_tokenizer, text), theirs["qformer_input_ids"][0]
        )
        tokens = tokenise(processor.tokenizer, prompt, config.image_token_id, ours.tokens)
        np.testing.assert_array_equal(tokens.ids, theirs["input_ids"][0])
        two = tokenise(processor.tokenizer, render("instructblip", question, 2), config.image_token_id, ours.tokens)
        np.testing.assert_array_equal(two.ids, [config.image_token_id] * ours.tokens + tokens.ids.tolist())
        assert two.image_spans == ((0, ours.tokens), (ours.tokens, ours.tokens))
        assert two.text[two.offsets[two.indices("user")[0], 0] :].startswith(question.split()[0])
