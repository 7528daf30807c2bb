"""Tokenizer and chat template: what is rendered, what is masked, what is refused."""

from __future__ import annotations

import json

import pytest

from dccot_jax.data import template, tokenizer
from dccot_jax.records import InputError

CORPUS = [
    f"Tom has {i} apples and buys {j} more. How many apples does Tom have?\n{i} + {j} = {i + j}\nThe answer is {i + j}."
    for i, j in ((i, i * 3 % 17) for i in range(120))
]
THINKING = "<think>\nTom has 2 apples.\n</think>\n2 + 3 = 5\nThe answer is 5."
# Drops everything before </think> from assistant turns, as some reasoning models' templates do.
DROPS_THINKING = (
    "{% for m in messages %}{% set c = m['content'] %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + c + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_END = tokenizer.CHAT_TEMPLATE.replace(" + '<|end|>'", "")
# The generation prompt opens something that the full conversation does not have.
NOT_PREFIX = tokenizer.CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|>Sure: '")
# Adds a system prompt, a new line after every turn, and an empty thinking block before an answer that has none.
ELABORATE = (
    "<|system|>Be brief.<|end|>\n{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and '<think>' not in m['content'] %}{{ '<think></think>\n' }}{% endif %}"
    "{{ m['content'] | trim }}{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write_tokenizer(path, tokenizer.train_tokenizer(CORPUS))
    return path


@pytest.fixture
def tok(directory):
    return tokenizer.load_tokenizer(directory)


def test_training_is_deterministic_and_order_free():
    text = tokenizer.train_tokenizer(CORPUS)
    assert tokenizer.train_tokenizer(CORPUS) == text
    assert tokenizer.train_tokenizer(CORPUS[::-1]) == text


def test_special_tokens(tok):
    assert [tok.convert_tokens_to_ids(token) for token in tokenizer.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tok.pad_token_id == 0 and tok.eos_token_id == 1
    assert len(tok) <= tokenizer.VOCAB_SIZE


@pytest.mark.parametrize("text", ["2024 + 19 = 2043", "naïve ☃ 😀\t\n\n  x", " leading", "trailing ", "१२३", "½", "a  b", "'s don't"])
def test_every_text_survives_and_digits_stand_alone(tok, text):
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert tok.decode(ids) == text
    for token in tok.convert_ids_to_tokens(ids):
        assert not any(c.isdigit() for c in token) or len(token) == 1


def test_merges_pay_off_on_the_corpus(tok):
    ids = tok(CORPUS[0], add_special_tokens=False)["input_ids"]
    assert len(ids) < 0.5 * len(CORPUS[0])


def test_hash_ignores_formatting_and_sees_the_template(directory, tmp_path):
    tokenizer.copy_tokenizer(directory, tmp_path)
    known = tokenizer.tokenizer_hash(directory)
    assert tokenizer.tokenizer_hash(tmp_path) == known
    model = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(model, indent=2))
    assert tokenizer.tokenizer_hash(tmp_path) == known
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").write_text(config["chat_template"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None, "model_max_length": 7}))
    assert tokenizer.tokenizer_hash(tmp_path) == known
    (tmp_path / "chat_template.jinja").write_text(config["chat_template"] + " ")
    assert tokenizer.tokenizer_hash(tmp_path) != known
    (tmp_path / "chat_template.jinja").write_text(config["chat_template"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|pad|>"}))
    assert tokenizer.tokenizer_hash(tmp_path) != known


def test_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(tokenizer.TokenizerError, match=r"no tokenizer\.json"):
        tokenizer.load_tokenizer(tmp_path)
    with pytest.raises(tokenizer.TokenizerError, match=r"no tokenizer\.json"):
        tokenizer.copy_tokenizer(tmp_path, tmp_path / "out")


def test_broken_tokenizer_files_are_named(directory, tmp_path):
    whole = {name: (directory / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    for name, text, said in (
        ("tokenizer.json", whole["tokenizer.json"][:400], r"tokenizer\.json: not JSON"),
        ("tokenizer_config.json", "{'eos_token':", r"tokenizer_config\.json: not JSON"),
        ("tokenizer.json", "{}", r"transformers cannot read this tokenizer: .+"),
        ("tokenizer.json", '{"model": {"type": "NoSuch"}}', r"transformers cannot read this tokenizer: .+"),
    ):
        for each, kept in whole.items():
            (tmp_path / each).write_text(text if each == name else kept)
        with pytest.raises(InputError, match=said):
            tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json: not JSON"):
        tokenizer.tokenizer_hash(tmp_path)


def test_a_template_that_does_not_render_is_named(directory, tmp_path):
    tokenizer.copy_tokenizer(directory, tmp_path)
    tok = tokenizer.load_tokenizer(tmp_path, origin="/the/users/own")
    for broken, said in (
        ("{% for m in messages %}", r"at /the/users/own does not render \(line 1\): Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "does not render: "),
    ):
        tok.chat_template = broken
        with pytest.raises(template.TemplateError, match=said) as caught:
            template.check_template(tok)
        assert caught.value.fatal and caught.value.reason == "broken_template"


def test_mask_token_by_token(tok):
    row = template.render(tok, "Tom has 2 apples.", "2 + 3 = 5\nThe answer is 5.")
    spelled = tok.convert_ids_to_tokens(list(row.input_ids))
    border = spelled.index("<|assistant|>") + 1
    assert row.prompt_tokens == border
    assert spelled[0] == "<|user|>" and spelled[border - 2] == "<|end|>"
    assert spelled[-1] == "<|end|>" and spelled[border:].count("<|end|>") == 1
    assert tok.decode(list(row.input_ids[border:-1])) == "2 + 3 = 5\nThe answer is 5."
    assert list(row.input_ids[:border]) == template.render_prompt(tok, "Tom has 2 apples.")
    assert row.completion_tokens == len(spelled) - border


def test_white_space_around_a_target_is_dropped(tok):
    assert template.render(tok, "q", "\n\n 5. \n") == template.render(tok, "q", "5.")


def test_reasoning_is_kept_whole(tok):
    row = template.render(tok, "q", THINKING)
    assert tok.decode(list(row.input_ids[row.prompt_tokens : -1])) == THINKING


def test_template_that_drops_reasoning_is_refused(tok):
    tok.chat_template = DROPS_THINKING
    with pytest.raises(template.TemplateError, match="drops or rewrites") as caught:
        template.render(tok, "q", THINKING)
    assert caught.value.reason == "target_changed" and caught.value.fatal
    assert template.render(tok, "q", "5.").completion_tokens == 3  # nothing to drop here


def test_template_without_end_of_turn_is_refused(tok):
    tok.chat_template = NO_END
    with pytest.raises(template.TemplateError, match="no end-of-turn token") as caught:
        template.check_template(tok)
    assert caught.value.reason == "no_end_of_turn" and caught.value.fatal


def test_tokenizer_without_template_is_refused(tok):
    tok.chat_template = None
    for call in (lambda: template.check_template(tok), lambda: template.render_prompt(tok, "q"), lambda: template.stop_ids(tok)):
        with pytest.raises(template.TemplateError, match="has no chat template") as caught:
            call()
        assert caught.value.fatal


def test_prompt_must_be_a_prefix(tok):
    tok.chat_template = NOT_PREFIX
    with pytest.raises(template.TemplateError) as caught:
        template.render(tok, "q", "5.")
    assert caught.value.reason == "prompt_not_prefix"


def test_elaborate_template(tok):
    """A system prompt counts as prompt, an inserted thinking block as completion, and the new line after the end is cut."""
    tok.chat_template = ELABORATE
    row = template.render(tok, "q", "The answer is 5.")
    assert tok.decode(list(row.input_ids[: row.prompt_tokens])) == "<|system|>Be brief.<|end|>\n<|user|>q<|end|>\n<|assistant|>"
    assert tok.decode(list(row.input_ids[row.prompt_tokens :])) == "<think></think>\nThe answer is 5.<|end|>"


def test_one_bad_row_does_not_spoil_the_others(tok):
    good, injected, empty, prompt = template.render_many(tok, [("q", "5."), ("q", "a <|end|> b"), ("q", "  "), ("x <|end|> y", "5.")])
    assert isinstance(good, template.Rendered)
    assert [row.reason for row in (injected, empty, prompt) if isinstance(row, template.TemplateError) and not row.fatal] == [
        "end_of_turn_in_text",
        "empty_target",
        "end_of_turn_in_text",
    ]


def test_stop_ids_hold_the_turn_end_first(tok):
    assert template.stop_ids(tok) == [1]
    tok.eos_token = "<|pad|>"
    tok.chat_template = tok.chat_template + "{# another key for the cache #}"
    assert template.stop_ids(tok) == [1, 0]


@pytest.mark.realdata
def test_smollm2_template(smollm2_dir):
    tok = tokenizer.load_tokenizer(smollm2_dir)
    row = template.render(tok, "What is 12 + 3?", THINKING)
    before, after = (str(tok.decode(list(ids))) for ids in (row.input_ids[: row.prompt_tokens], row.input_ids[row.prompt_tokens :]))
    assert before.startswith("<|im_start|>system\n") and before.endswith(
        "<|im_start|>user\nWhat is 12 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert after == THINKING + "<|im_end|>"  # the template's last new line is cut
    assert template.stop_ids(tok) == [2]
    assert template.render_prompt(tok, "What is 12 + 3?") == list(row.input_ids[: row.prompt_tokens])
