"""The shipped small model: its tokenizer, prompt template and untrained weights, in Hugging Face format.

CLIP tower (224 px, patch 14, CLS) → 2-layer GELU projector → Llama decoder, as `LlavaForConditionalGeneration`. An
image is 256 visual tokens. A clip frame is the same 256, mean-pooled 2x2 after the projector to 64; `<video>` stands
for the tokens of all frames, one after the other. `config.json` says so: `video_token_id`, `frame_pool_size`.

Write the untrained folder:  python -m demos.train.model --out FOLDER
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from demos.train.data.clips import sample_clip
from demos.train.data.questions import (
    CLIP_KINDS,
    SCENE_KINDS,
    WORDINGS,
    ClipAsker,
    SceneAsker,
    SeveralAsker,
    answer_words,
    templates,
)
from demos.train.data.scenes import sample_scene
from demos.train.data.things import CHARACTERS, GRID, PATCH_PX, SIDE_PX

SEED = 0
VOCAB = 1024
IMAGE_TOKENS = GRID * GRID
FRAME_POOL = 2
CONTEXT = 4096
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<video>", "<|user|>", "<|assistant|>", "<|system|>")
POSITION_AMPLITUDE = 0.6  # the 2-D sin-cos added to the tower's position embedding
TOWER = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}
DECODER = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
}
# Words that later data will ask for, so that a longer training needs no new tokenizer.
MORE_WORDS = """
bar bars chart value values highest lowest tallest shortest counter number display digit digits shows frame frames
second third before after while then same different both first last video image picture clip scene background behind
front near between next corner edge side upper lower top bottom left right middle center big tiny huge bright dark gray
brown cyan rectangle oval line arrow hexagon letter letters word words written reads above below each every all none
many much more less most least equal sum total how what where when which who why does do did is are was were has have
had can could will would should in on at of to from with without by for and or not but if as it its this that these
those there here he she they we you I me my your our their color colour colors shape shapes size sizes object objects
thing things place position direction count name list describe tell say read spell show see look find move moves moved
moving go goes appear appears disappear disappears vanish vanishes turn turns change changes become becomes grow grows
rotate rotates blink start end begin finish yes no ok please thanks hello one two three four five six seven eight nine
ten eleven twelve zero user assistant system answer question short long brief detailed caption sentence only just also
very old new good bad other another some any fast slow up down away toward towards forward back again still always
never once twice during until since now Describe What Where Which How Is Are Does Do Can There The A An In On At It
This That They Read Name Count List Say Go Please
"""
CHAT_TEMPLATE = """
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|' + message['role'] + '|>' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] | trim -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] in ('image', 'image_url') -%}
        {{- '<image>' -}}
      {%- elif part['type'] in ('video', 'video_url') -%}
        {{- '<video>' -}}
      {%- elif part['type'] == 'text' -%}
        {{- part['text'] | trim -}}
      {%- else -%}
        {{- raise_exception('unknown content part ' + part['type']) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {{- eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
{%- endif -%}
"""


# ── tokenizer ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes; each capital that starts no word, and each digit, is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    alone = pre_tokenizers.Split(Regex(" ?[A-Z](?![a-z])| ?[0-9]"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=1,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<video>", "<|user|>", "<|assistant|>", "<|system|>"],
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        padding_side="left",
    )
    assert len(fast) == VOCAB, len(fast)
    assert fast.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))
    for word in [*answer_words(), *CHARACTERS]:
        assert len(fast.encode(word)) == len(fast.encode(" " + word)) == 1, word
    return fast


def tokenizer_corpus() -> list[str]:
    """Text of the generator, and every word that must be one token often enough to become one."""
    lines = []
    for seed in range(1500):
        rng = np.random.default_rng([7, seed])
        scene, clip = SceneAsker(sample_scene(seed), rng), ClipAsker(sample_clip(seed), rng)
        asked = [scene.ask(kind) for kind in SCENE_KINDS] + [clip.ask(kind) for kind in CLIP_KINDS]
        asked += [SeveralAsker([sample_scene(seed), sample_scene(seed + 1)], rng).ask_which()]
        lines += [f"{q.text} {q.answer}" for q in asked if q]
    lines += [text for kind in WORDINGS for text in templates(kind)] * 3
    lines += [text for w in [*answer_words(), *CHARACTERS] for text in (w, f" {w}")] * 300
    lines += [text for w in MORE_WORDS.split() for text in (w, f" {w}", f" {w}")] * 10
    return lines


# ── model ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_config() -> LlavaConfig:
    ids = {name: i for i, name in enumerate(SPECIAL)}
    ends = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<pad>"]}
    decoder = LlamaConfig(
        **DECODER,
        **ends,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=0.02,
    )
    tower = CLIPVisionConfig(**TOWER, image_size=SIDE_PX, patch_size=PATCH_PX, hidden_act="gelu", projection_dim=256)
    return LlavaConfig(
        vision_config=tower,
        text_config=decoder,
        **ends,
        image_token_index=ids["<image>"],
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
        frame_pool_size=FRAME_POOL,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    side = {"height": SIDE_PX, "width": SIDE_PX}
    half = [0.5, 0.5, 0.5]
    image = CLIPImageProcessor(size=side, do_center_crop=False, crop_size=side, image_mean=half, image_std=half)
    return LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE.strip(),
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_model(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """Untrained, with a tower that knows rows and columns from the start."""
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(config)
    position = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        position[1:] += POSITION_AMPLITUDE * sincos_2d(GRID, TOWER["hidden_size"])
    for weight in model.model.multi_modal_projector.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))
        else:
            nn.init.zeros_(weight)
    return model


def sincos_2d(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of the row, then of the column."""
    frequencies = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    return torch.cat([one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)], dim=2).reshape(side**2, width)


def pool_frames(tokens: Tensor, pool: int = FRAME_POOL) -> Tensor:
    """(T, 256, D) projected frames → (T * 64, D): means of 2x2 neighbours, frame after frame, in raster order."""
    num_frames, num_tokens, width = tokens.shape
    side = math.isqrt(num_tokens)
    blocks = tokens.view(num_frames, side // pool, pool, side // pool, pool, width)
    return blocks.mean(dim=(2, 4)).reshape(-1, width)


def normalise(pixels: np.ndarray) -> Tensor:
    """uint8 (B, 224, 224, 3) → what the shipped processor gives for pictures of this size, float32 (B, 3, 224, 224)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def save_weights(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write weights (bfloat16), config.json and generation_config.json."""
    ends = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    half = LlavaForConditionalGeneration(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.tie_weights()
    half.generation_config = GenerationConfig(do_sample=False, **ends)
    half.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = train_tokenizer()
    model = build_model(build_config())
    save_weights(model, args.out)
    build_processor(tokenizer).save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters in {args.out}")


if __name__ == "__main__":
    main()
