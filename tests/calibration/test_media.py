"""Videos and sounds as data: how they are opened, and what batches and prunes come of them."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from transformers import (
    Blip2Processor,
    BlipImageProcessor,
    CLIPVisionConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
)

import hf_adaptive_sparse as has
from hf_adaptive_sparse.calibration.data import load_batches
from hf_adaptive_sparse.calibration.media import Media, require_processor
from hf_adaptive_sparse.calibration.pictures import MAX_FRAMES, load_frames
from hf_adaptive_sparse.calibration.processors import load_processor
from hf_adaptive_sparse.calibration.questions import format_question
from hf_adaptive_sparse.calibration.records import TRANSCRIBE, DataError, read_records
from hf_adaptive_sparse.calibration.sounds import load_sound
from hf_adaptive_sparse.compressor import DataSource, ModelSource
from hf_adaptive_sparse.evaluation.vqa import vqa_accuracy
from tests.conftest import llama_config
from tests.processors import make_audio_processor, make_llava_processor, make_video_processor

RATE = 16_000


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    out = io.BytesIO()
    wavfile.write(out, rate, samples)
    return out.getvalue()


def frames(count: int = 3, size: int = 16) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), (20 * i, 0, 200)) for i in range(count)]


def animation(count: int, kind: str = "GIF") -> bytes:
    out = io.BytesIO()
    first, *others = frames(count)
    first.save(out, kind, save_all=True, append_images=others, duration=40)
    return out.getvalue()


def tiff_without_width() -> bytes:
    """Two frames, of which the second lacks the tag of its width."""
    before, tag, behind = animation(2, "TIFF").rpartition(b"\x00\x01\x04\x00")
    return before + tag.replace(b"\x01", b"\xff") + behind


@pytest.fixture
def audio_model() -> PreTrainedModel:
    torch.manual_seed(0)
    text = llama_config()
    config = Qwen2AudioConfig(
        text_config=text.to_dict(),
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=8,
            d_model=16,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            max_source_positions=50,
        ).to_dict(),
        audio_token_index=make_audio_processor().audio_token_id,
    )
    return Qwen2AudioForConditionalGeneration(config).eval()


@pytest.fixture
def video_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlavaNextVideoConfig(
        text_config=llama_config().to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ).to_dict(),
        image_token_index=4,
        video_token_index=make_video_processor().video_token_id,
        image_grid_pinpoints=[[16, 16]],
    )
    return LlavaNextVideoForConditionalGeneration(config).eval()


@pytest.fixture
def sound_file(tmp_path: Path) -> Path:
    """WAV files of several rates and forms beside a file that names them."""
    (tmp_path / "sounds").mkdir()
    rows = []
    for index, rate in enumerate((8_000, 16_000, 44_100)):
        samples = tone(0.4 + 0.1 * index, rate)
        name = f"sounds/{index}.wav"
        (tmp_path / name).write_bytes(wav((samples * 32767).astype(np.int16), rate))
        rows.append({"audio": name, "question": f"what is {index}?", "answer": f"a {index}"})
    path = tmp_path / "sounds.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def clip_file(tmp_path: Path) -> Path:
    rows = [
        {
            "frames": [{"bytes": animation(1, "PNG"), "path": None}] * count,
            "question": "what?",
            "answer": "red",
        }
        for count in (3, 3)
    ]
    path = tmp_path / "clips.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_every_form_of_a_sound_is_the_same_sound(dtype: str, tmp_path: Path) -> None:
    samples = tone()
    stored: np.ndarray = samples.astype(np.float32)
    if dtype == "uint8":
        stored = (samples * 127 + 128).round().astype(np.uint8)
    elif dtype != "float32":
        stored = (samples * np.iinfo(dtype).max).astype(dtype)
    content = wav(np.stack([stored, stored], axis=1))
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    forms: list[Any] = [content, path, str(path), {"bytes": content, "path": "x"}]
    forms += [{"bytes": None, "path": str(path)}]
    if dtype == "float32":
        stereo = np.stack([samples, samples])
        forms += [{"array": samples.tolist(), "sampling_rate": RATE}]
        forms += [{"array": stereo, "sampling_rate": RATE}]
    for form in forms:
        opened = load_sound(form, RATE)
        assert opened.dtype == np.float32
        np.testing.assert_allclose(opened, samples, atol=1 / 127 if dtype == "uint8" else 1e-4)


def test_sounds_are_resampled() -> None:
    sound = {"array": tone(0.5, 44_100), "sampling_rate": 44_100}
    opened = load_sound(sound, RATE)
    inner = slice(800, -800)  # the filter rings at both ends
    np.testing.assert_allclose(opened[inner], tone(0.5)[inner], atol=0.01)


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (np.zeros(4), r"must be \{'array', 'sampling_rate'\}.* got ndarray"),
        ({"array": [0.0]}, "must have a 'sampling_rate'"),
        ({"array": [], "sampling_rate": RATE}, "none of them 0"),
        ({"array": [0.0, float("nan")], "sampling_rate": RATE}, "must be finite"),
        ({"array": ["a"], "sampling_rate": RATE}, "must hold numbers"),
        ({"array": [0.0], "sampling_rate": 0.5}, "whole number >= 1, got 0.5"),
        ({"array": [0.0], "sampling_rate": "16k"}, "whole number >= 1, got '16k'.*such as 16000"),
        ({"array": [0.0], "sampling_rate": float("nan")}, "whole number >= 1, got nan"),
        (b"RIFF broken", "WAV file cannot be read"),
        ("missing.wav", "cannot be opened"),
    ],
)
def test_bad_sounds(sound: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_sound(sound, RATE)


def test_sounds_that_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(DataError, match="pip install soundfile, or give WAV"):
        load_sound(b"fLaC", RATE)


def test_every_form_of_a_video(tmp_path: Path) -> None:
    array = np.stack([np.asarray(frame) for frame in frames()])
    path = tmp_path / "a.gif"
    path.write_bytes(animation(3))
    for form in (frames(), array, path, str(path), {"bytes": animation(3, "WEBP"), "path": None}):
        opened = load_frames(form)
        assert [(frame.size, frame.mode) for frame in opened] == [((16, 16), "RGB")] * 3
        assert opened[0].getpixel((5, 5))[0] < opened[2].getpixel((5, 5))[0]
    long = load_frames(animation(20))
    assert len(long) == MAX_FRAMES
    red = [frame.getpixel((5, 5))[0] for frame in long]
    assert red == sorted(red)
    assert len(load_frames(frames(20))) == 20  # a list is taken as it is


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "must have a frame"),
        (frames(1) + frames(1, 8), "must have one size"),
        (np.zeros((2, 4, 4)), r"uint8 of the shape .* got float64 of \(2, 4, 4\)"),
        (3, "must be a list of frames.* got int"),
        ("missing.gif", "cannot be opened"),
        ([b"no image"], "image cannot be opened"),
        (tiff_without_width(), "be opened: Missing dimensions"),
    ],
)
def test_bad_videos(video: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_frames(video)


def test_films_that_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_adaptive_sparse.calibration.pictures.DECODERS", {"none": "no_such"})
    with pytest.raises(DataError, match="pip install av, or give each video as a list"):
        load_frames(b"no film")


def test_batches_of_sounds(sound_file: Path, audio_model: PreTrainedModel) -> None:
    processor = make_audio_processor()
    (batch,) = load_batches(sound_file, processor, config=audio_model.config, batch_size=3)
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "labels",
        "input_features",
        "feature_attention_mask",
    }
    assert batch["input_features"].shape == (3, 8, 100)
    heard = (batch["input_ids"] == processor.audio_token_id).sum(1).tolist()
    # 0.4, 0.5 and 0.6 s whatever the rate of the file, 25 tokens a second.
    assert heard == [10, 12, 15]
    for index, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        assert processor.tokenizer.decode(ids[labels != -100]) == f" a {index}"
        assert processor.tokenizer.decode(ids).startswith("<s><audio>")
    assert 1 < has.perplexity(audio_model, [batch]) < float("inf")


def test_batches_of_videos(clip_file: Path, video_model: PreTrainedModel) -> None:
    processor = make_video_processor()
    (batch,) = load_batches(clip_file, processor, config=video_model.config, batch_size=2)
    assert batch["pixel_values_videos"].shape == (2, 3, 3, 16, 16)
    assert ((batch["input_ids"] == processor.video_token_id).sum(1) == 3).all()
    scored = batch["labels"] != -100
    assert processor.tokenizer.decode(batch["input_ids"][0][scored[0]]) == " red"
    # The frames are chosen already: a processor that sampled would want to know their times.
    assert processor.video_processor.options["do_sample_frames"] is False
    report = has.prune(video_model, has.SparsityConfig(), [batch], progress=False)
    assert report.mean_sparsity == pytest.approx(0.5, abs=1e-3)


def test_prune_and_answers_with_sounds(sound_file: Path, audio_model, tmp_path: Path) -> None:
    """A model that hears, from the folder that a user has, through the data of `compress`."""
    audio_model.save_pretrained(tmp_path / "model")
    source = ModelSource(tmp_path / "model")
    model, processor = source.load(), make_audio_processor()
    assert type(model) is type(audio_model)
    data = DataSource(sound_file)
    batches = data.batches(processor, model.config, "train")
    unlike = [{k: v for k, v in b.items() if k in ("input_ids", "attention_mask")} for b in batches]
    text = [{k: v[:, 12:] for k, v in b.items()} for b in unlike]
    has.prune(model, has.SparsityConfig(), batches, progress=False)
    has.prune(audio_model, has.SparsityConfig(), text, progress=False)
    name = "model.language_model.layers.0.mlp.gate_proj"
    kept, other = (m.get_submodule(name).weight != 0 for m in (model, audio_model))
    assert not torch.equal(kept, other)  # the sounds were heard
    records = data.questions(model.config, "validation")
    assert records is not None
    result = vqa_accuracy(model, processor, records, batch_size=2)
    assert (result.count, records.kind) == (3, "audio_question")


def test_sounds_with_transcripts() -> None:
    sound = {"array": tone(), "sampling_rate": RATE}
    for column in ("text", "sentence", "transcription"):
        (row,) = read_records([{"audio": sound, column: "hello there"}])
        assert (row["question"], row["answers"]) == (TRANSCRIBE, ("hello there",))
    # A model without ears reads the text.
    assert read_records([{"audio": sound, "text": "hello"}], media=("image",)).kind == "text"
    for said in ({"question": "q", "answer": "a"}, {"transcript": "hello"}):
        with pytest.raises(DataError, match="about sounds, but the model takes none beside text"):
            read_records([{"audio": sound, **said}], media=("image",))


def test_bad_rows_are_named(audio_model: PreTrainedModel, video_model: PreTrainedModel) -> None:
    good = {"audio": {"array": tone(), "sampling_rate": RATE}, "question": "q", "answer": "a"}
    with pytest.raises(DataError, match=r"have a sound, .*; row 0 of .* nothing usable in 'audio'"):
        list(read_records([{**good, "audio": None}]))
    rows = list(read_records([good, {**good, "audio": {"array": [0.0]}}]))
    media = Media.of(rows)
    assert media is not None
    with pytest.raises(DataError, match=r"Column 'audio' of row 1 of .*'sampling_rate'"):
        media.arguments(make_audio_processor())
    rows = list(read_records([{"frames": [b"x"], "question": "q", "answer": "a"}]))
    media = Media.of(rows)
    assert media is not None
    with pytest.raises(DataError, match=r"Column 'frames' of row 0 of"):
        media.arguments(make_video_processor())
    with pytest.raises(DataError, match="must all have"):
        Media.of([rows[0], {"question": "q"}])


def test_processors_that_take_none() -> None:
    with pytest.raises(ValueError, match=r"holds videos, .* a video processor; LlavaProcessor has"):
        require_processor(make_llava_processor(), "video", "clips")
    with pytest.raises(ValueError, match=r"holds sounds, .* a feature extractor; LlavaProcessor"):
        require_processor(make_llava_processor(), "audio", "sounds")

    class Conversations:  # as Voxtral's processor, which takes sounds in its chat template only
        feature_extractor = object()

        def __call__(self, text: str) -> None: ...

    with pytest.raises(ValueError, match=r"conversations of its own.*apply_chat_template"):
        require_processor(Conversations(), "audio", "sounds")


LISTS = (
    "{% for part in messages[0]['content'] %}{% if part['type'] != 'text' %}<{{ part['type'] }}>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}:"
)


@pytest.mark.parametrize(
    "template",
    [
        LISTS,
        "{{ messages[0]['content'] }}:",  # prints a list as it is written in Python
        "{{ messages[0]['content'] + ':' }}",  # fails on a list
    ],
)
def test_chat_templates_with_and_without_a_word_for_sounds(template: str) -> None:
    processor = make_audio_processor(template)
    assert format_question(processor, "what <audio>?", medium="audio") == "<audio>what ?:"


def test_a_processor_that_cannot_be_loaded_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_llava_processor().save_pretrained(tmp_path)

    def refuse(*args: object, **settings: object) -> None:
        raise ImportError("\nThis processor requires torchvision\nPlease install it")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", refuse)
    with caplog.at_level(logging.WARNING):
        assert load_processor(tmp_path)("a")["input_ids"] == [7]
    assert "text alone. This processor requires torchvision Please install it" in caplog.text


def test_a_processor_whose_constructor_drops_the_chat_template_has_its_tokenizers(
    tmp_path: Path,
) -> None:
    """As Phi-4-multimodal's; its template is in the repo, and the model is trained on it."""
    tokenizer = make_llava_processor().tokenizer
    tokenizer.chat_template = LISTS
    Blip2Processor(BlipImageProcessor(), tokenizer).save_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    assert isinstance(processor, Blip2Processor)
    assert format_question(processor, "what?") == "<image>what?:"


def test_a_tokenizer_in_the_place_of_a_processor_says_what_that_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_adaptive_sparse.calibration.media.is_torchvision_available", bool)
    with pytest.raises(ValueError, match=r"AutoProcessor, .* need torchvision: pip install it"):
        require_processor(make_llava_processor().tokenizer, "image", "pictures")


def test_what_a_processor_does_not_take_as_one_batch(video_model: PreTrainedModel) -> None:
    """As LLaVA-OneVision's and InternVL's, which do not pad videos of different lengths."""
    rows = [{"frames": frames(n), "question": "what?", "answer": "red"} for n in (2, 3)]
    data, processor = datasets.Dataset.from_list(rows), make_video_processor()
    with pytest.raises(ValueError, match=r"not take 2 questions as one batch: .*batch size of 1"):
        load_batches(data, processor, config=video_model.config, batch_size=2)
    assert len(load_batches(data, processor, config=video_model.config)) == 2
