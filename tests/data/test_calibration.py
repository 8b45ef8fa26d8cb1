"""Every form that samples come in becomes the same batches, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertTokenizer, T5Config

from hf_merge import CalibrationData, ConfigError
from hf_merge.data.batching import collate, make_batches, without_padding
from hf_merge.data.samples import TaskModel, _contents


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "free", "great", "money", "the", "was"]
ARGUMENTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "pixel_values", "inputs_embeds"})
TEXTS = ["the film was great", "free money", "a film", "the money was free a film"]


def bert(task: str = "a", folder: Path | None = None, positions: int | None = 16) -> TaskModel:
    return TaskModel(task, BertConfig(vocab_size=len(WORDS)), ARGUMENTS, "input_ids", positions, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(path)
    return path


def tokens(length: int, start: int = 5) -> torch.Tensor:
    return torch.arange(start, start + length) % len(WORDS)


def rows(count: int = 6) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens(3 + index % 3, index)} for index in range(count)]


def load(samples, **kwargs):
    return CalibrationData({"a": samples}, **kwargs).load([bert()])


def contents(loaded) -> list[list[int]]:
    return [sample["input_ids"].tolist() for sample in loaded.samples[0]]


# -- forms ------------------------------------------------------------------------------------------------------------


def test_all_forms_of_tensors_are_the_same():
    expected = [row["input_ids"].tolist() for row in rows()]
    lists = [{"input_ids": row} for row in expected]
    assert contents(load(rows())) == expected
    assert contents(load(lists)) == expected
    assert contents(load(datasets.Dataset.from_list(lists))) == expected
    assert contents(load(datasets.Dataset.from_list(lists).with_format("torch"))) == expected
    assert contents(load(DataLoader(rows(), batch_size=1))) == expected
    padded = collate(rows(), {}).inputs
    assert contents(load(padded)) == expected
    assert contents(load([padded])) == expected


def test_texts_are_tokenised_with_the_tokenizer_of_the_expert(folder: Path):
    model = bert(folder=folder)
    expected = BertTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    labelled = [{"text": text, "label": index} for index, text in enumerate(TEXTS)]
    for samples in (TEXTS, tuple(TEXTS), labelled, datasets.Dataset.from_list(labelled)):
        loaded = CalibrationData({"a": samples}).load([model])
        assert contents(loaded) == expected
    assert loaded.labels == {"a": [0, 1, 2, 3]}


def test_columns_choose_the_text_and_pairs_of_texts(folder: Path):
    samples = [{"first": "a film", "second": "the money", "idx": 3}]
    tokenizer = BertTokenizer.from_pretrained(folder)
    pair = CalibrationData({"a": samples}, columns=["first", "second"]).load([bert(folder=folder)])
    assert contents(pair) == [tokenizer("a film", "the money")["input_ids"]]
    with pytest.raises(ConfigError, match="columns first, second, idx: name the one"):
        CalibrationData({"a": samples}).load([bert(folder=folder)])
    with pytest.raises(ConfigError, match="no column 'third'"):
        CalibrationData({"a": samples}, columns={"a": "third"}).load([bert(folder=folder)])


def test_a_tokenizer_can_be_passed(folder: Path):
    tokenizer = BertTokenizer.from_pretrained(folder)
    loaded = CalibrationData({"a": TEXTS}, processor=tokenizer, max_length=4).load([bert()])
    assert [len(row) for row in contents(loaded)] == [4, 4, 4, 4]


def test_without_a_tokenizer_texts_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="given in memory, without a tokenizer"):
        load(TEXTS)
    with pytest.raises(ConfigError, match=r"No AutoTokenizer can be loaded from"):
        CalibrationData({"a": TEXTS}).load([bert(folder=tmp_path)])


def test_images_are_tensors_of_three_dimensions():
    images = torch.randn(5, 3, 4, 4)
    for samples in ({"pixel_values": images}, [{"pixel_values": image} for image in images]):
        loaded = load(samples)
        assert torch.equal(loaded.batches(8)[0][0].inputs["pixel_values"], images)


def test_labels_are_kept_apart():
    samples = [row | {"labels": torch.tensor(index)} for index, row in enumerate(rows())]
    loaded = load(samples)
    assert all("labels" not in sample for sample in loaded.samples[0])
    assert [int(label) for label in loaded.labels["a"]] == list(range(6))


def test_a_label_is_no_text():
    rows = [{"text": "a fine film", "label": "pos"}, {"text": "a dull one", "label": "neg"}]
    assert [_contents(row, bert(), None) for row in rows] == ["a fine film", "a dull one"]


def test_encoder_decoders_get_decoder_inputs():
    config = T5Config(decoder_start_token_id=0)
    model = TaskModel("a", config, ARGUMENTS | {"decoder_input_ids"}, "input_ids")
    sample = CalibrationData({"a": [{"input_ids": tokens(3)}]}).load([model]).samples[0][0]
    assert sample["decoder_input_ids"].tolist() == [0, 5, 6]


# -- drawing ----------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_the_seed_only():
    many = [{"input_ids": tokens(3, index)} for index in range(12)]
    first, again = load(many, num_samples=5, seed=1), load(many, num_samples=5, seed=1)
    other = load(many, num_samples=5, seed=2)
    assert contents(first) == contents(again) != contents(other)
    assert len(contents(first)) == 5
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_fewer_samples_than_asked_for_are_all_used():
    assert len(contents(load(rows(), num_samples=100))) == 6


def test_a_loader_is_read_no_further_than_needed():
    read = []

    def batches():
        for index in range(1000):
            read.append(index)
            yield {"input_ids": torch.full((2, 3), 5 + index % 4)}

    assert len(contents(load(batches(), num_samples=5))) == 5
    assert len(read) == 3


# -- batches ----------------------------------------------------------------------------------------------------------


def test_samples_of_similar_length_are_together_and_padded_behind():
    loaded = load(rows())
    batches = loaded.batches(2)[0]
    assert [batch.inputs["input_ids"].shape[1] for batch in batches] == [3, 4, 5]
    mixed = loaded.batches(6)[0][0]
    assert mixed.inputs["attention_mask"].sum(1).tolist() == [3, 3, 4, 4, 5, 5]
    assert mixed.inputs["input_ids"][0, 3:].tolist() == [0, 0]


def test_the_mask_is_known_per_token():
    batch = load(rows()).batches(6)[0][0]
    mask = batch.token_mask((6, 5, 32), decoder=False)
    assert mask.dtype == torch.bool and mask.sum() == 24
    assert batch.token_mask((6, 9, 32), decoder=False) is None
    assert load(rows()).batches(2)[0][0].token_mask((2, 3, 32), decoder=False) is None


def test_padding_at_the_end_is_cut_and_at_the_beginning_is_not():
    sample = {
        "input_ids": tokens(5),
        "attention_mask": torch.tensor([0, 1, 1, 0, 0]),
        "pixel_values": torch.zeros(5, 2, 2),
    }
    cut = without_padding(sample)
    assert cut["input_ids"].tolist() == tokens(3).tolist()
    assert cut["attention_mask"].tolist() == [0, 1, 1]
    assert cut["pixel_values"].shape == (5, 2, 2)


def test_samples_of_other_layout_are_other_batches():
    samples = [{"pixel_values": torch.zeros(3, size, size)} for size in (4, 6, 4)]
    assert [batch.count for batch in make_batches(samples, 8, {})] == [2, 1]


# -- what does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "samples of 'a' are empty"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "samples of 'a' are empty"),
        ("one text", "are one string"),
        (7, "are a int"),
        ([{"input_ids": tokens(20)}], "has 20 tokens in 'input_ids', but the model has 16 positions"),
        ([{"pixel_values": torch.full((3, 2, 2), float("nan"))}], "holds NaN or infinity in 'pixel_values'"),
        ([{"pixel_values": torch.zeros(2, 2)}], r"has the shape \(2, 2\)"),
        ({"input_ids": torch.zeros(3, 4), "attention_mask": torch.zeros(2, 4)}, "differ in length"),
        ([{"input_ids": [[1], [2, 3]]}], "cannot be turned into tensors"),
    ],
)
def test_what_does_not_fit_is_named(samples, message: str):
    with pytest.raises(ConfigError, match=message):
        load(samples)


def test_long_texts_are_cut_to_the_positions_of_the_model(folder: Path):
    loaded = CalibrationData({"a": ["film " * 50]}).load([bert(folder=folder)])
    assert len(contents(loaded)[0]) == 16


def test_one_sample_is_enough():
    assert len(load(rows(1)).batches(8)[0]) == 1


def test_tasks_have_to_agree_with_the_experts():
    data = CalibrationData({"a": rows(), "spum": rows()})
    problems = data.problems(["a", "spam"])
    assert "no expert is called so. Did you mean 'spam'?" in problems[0]
    assert "no calibration samples for 'spam'" in problems[1]


@pytest.mark.parametrize("samples", [{}, [1, 2], None])
def test_data_are_a_dictionary(samples):
    with pytest.raises(ConfigError, match="must be a dictionary"):
        CalibrationData(samples)


def test_num_samples_is_positive():
    with pytest.raises(ConfigError, match="num_samples must be at least 1, got 0"):
        CalibrationData({"a": rows()}, num_samples=0)


def test_numpy_images_are_floats():
    loaded = load({"pixel_values": np.zeros((2, 3, 4, 4))})
    assert loaded.samples[0][0]["pixel_values"].dtype == torch.float32


# -- copies -----------------------------------------------------------------------------------------------------------


def drop_a_token(
    task: int, arguments: dict[str, torch.Tensor], generator: np.random.Generator
) -> dict[str, torch.Tensor]:
    left_out = int(generator.integers(arguments["input_ids"].shape[1]))
    keep = [index for index in range(arguments["input_ids"].shape[1]) if index != left_out]
    return {key: value[:, keep] for key, value in arguments.items()}


def test_copies_are_changed_and_follow_the_samples():
    samples = [row | {"label": index} for index, row in enumerate(rows(2))]
    loaded = load(samples, copies=3, augment=drop_a_token)
    assert contents(loaded)[:2] == contents(load(samples))
    assert [len(row) for row in contents(loaded)] == [3, 4, 2, 3, 2, 3]
    assert [int(label) for label in loaded.labels["a"]] == [0, 1, 0, 1, 0, 1]
    assert contents(loaded) == contents(load(samples, copies=3, augment=drop_a_token))


def test_copies_need_something_that_changes_them():
    with pytest.raises(ConfigError, match="copies=2 needs to be positive, and 'augment'"):
        CalibrationData({"a": rows()}, copies=2)
