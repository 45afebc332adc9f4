"""Recipes: what is read, what is refused and in which words; the recipes that ship are valid."""

from pathlib import Path

import pytest
import tiny_recipe

from fastlm.errors import InputError
from fastlm.recipe import load_recipe

SHIPPED = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


@pytest.fixture
def path(tmp_path):
    return tiny_recipe.write(tmp_path)


def test_tables_become_the_stages_own_options(path):
    recipe = load_recipe(path)
    assert recipe.pretrain.max_steps == 12 and recipe.pretrain.batch_size == 4
    assert recipe.pretrain.sample_at == (0.0, 1.0)
    assert recipe.data.rules == ()
    config = recipe.model_config(300, 0)
    assert config.vocab_size == 300 and config.max_position_embeddings == 32
    assert config.tie_word_embeddings


def test_overrides(path):
    recipe = load_recipe(path, ["pretrain.max_seconds=60", "name=other", "data.rules=['web']"])
    assert recipe.pretrain.max_seconds == 60.0 and recipe.name == "other"
    assert "word_count" in recipe.data.rules


@pytest.mark.parametrize(
    "override, text",
    [
        (
            "pretrain.bach_size=4",
            "pretrain.bach_size: unknown key; the nearest known one is 'batch_size'",
        ),
        ("max_seconds=5", "unknown key; the nearest known one is pretrain.max_seconds"),
        ("batch_size=5", "the nearest known one is pretrain.batch_size or eval.batch_size"),
        ("pretrian.lr=1", "pretrian: unknown key; the nearest known one is 'pretrain'"),
        (
            "model.hiden_size=4",
            "model.hiden_size: unknown key; the nearest known one is 'hidden_size'",
        ),
        (
            "model.num_attention_heads=3",
            "model.hidden_size: wanted a multiple of num_attention_heads 3",
        ),
        (
            "pretrain.batch_size='four'",
            "pretrain.batch_size: wanted a whole number, got a string 'four'",
        ),
        ("pretrain.batch_size=4.5", "pretrain.batch_size: wanted a whole number, got a number 4.5"),
        (
            "pretrain.batch_size=true",
            "pretrain.batch_size: wanted a whole number, got true or false True",
        ),
        ("pretrain.lr='fast'", "pretrain.lr: wanted a number, got a string"),
        ("pretrain.lr=nan", "pretrain.lr: wanted a number"),
        ("pretrain.betas=[0.9]", "pretrain.betas: wanted 2 values, got 1"),
        ("pretrain.betas=0.9", "pretrain.betas: wanted an array, got a number"),
        ("data.sources=[1]", r"data.sources\[0\]: wanted a string, got a whole number 1"),
        ("data.sources=[]", "data.sources: wanted at least one source"),
        ("pretrain=3", "pretrain: wanted a table, got a whole number 3"),
        ("pretrain.max_steps=0", "pretrain.max_steps: wanted a positive number, got 0"),
        ("data.workers=0", "data.workers: wanted 1 or more, got 0"),
        ("eval.stride=64", "eval.stride: wanted at most pretrain.seq_len = 32, got 64"),
        ("lr", "set: wanted KEY=VALUE"),
        ("name=''", "name: wanted the name of a folder below runs/, got ''"),
        ("name='../other'", "name: wanted the name of a folder"),
        ("name='/tmp/x'", "name: wanted the name of a folder"),
        ("seed=-1", "seed: wanted 0 or more, got -1"),
        ("tokenizer.vocab_size=5", "tokenizer.vocab_size: wanted at least 259"),
        ("tokenizer.train_bytes=0", "tokenizer.train_bytes: wanted 1 or more"),
        ("quantize.format='w4a17'", "quantize.format: wanted one of w4a16"),
        ("quantize.method='gptq'", "quantize.method: wanted one of rtn"),
        ("quantize.group_size=-3", "quantize.group_size: wanted -1"),
        ("quantize.embeddings=3", "quantize.embeddings: wanted 4, 8, 16"),
        ("quantize.head=8", "quantize.head: shares its weight with the embeddings"),
    ],
)  # fmt: skip
def test_refusals_name_the_key_what_is_wanted_and_what_came(path, override, text):
    with pytest.raises(InputError, match=text) as e:
        load_recipe(path, [override])
    assert "\n" not in str(e.value)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = [")
    with pytest.raises(InputError, match="wanted TOML"):
        load_recipe(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(InputError, match="name: wanted, is missing"):
        load_recipe(tmp_path / "empty.toml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem and recipe.description
