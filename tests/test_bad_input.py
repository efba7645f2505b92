"""Bad input through the real command line: one message with the value, the rule and the remedy; nothing started.

Each case is a function that prepares the mistake and returns the command; `@bad` holds what the message must say.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import LABELS, Emoray, sentences, write_rows

from emoray import hub

Command = list[str]


@dataclass(frozen=True)
class Place:
    """Where a case plays: an empty folder, and good input to spoil."""

    folder: Path
    encoder: Path
    data: Path
    run: Path
    overrides: list[str]

    def train(self, *overrides: str, config: str | bytes = "run: {name: bad}\n") -> Command:
        """`emoray train` on a config file of this text; all is well but for what the overrides spoil."""
        path = self.folder / "config.yaml"
        path.write_bytes(config if isinstance(config, bytes) else config.encode())
        return ["train", str(path), *self.overrides, f"run.storage_path={self.folder / 'runs'}", *overrides]

    def copy(self, what: str) -> Path:
        """A copy of "encoder", "data" or "run" to spoil."""
        return Path(shutil.copytree(getattr(self, what), self.folder / what))

    def with_weights(self) -> Path:
        """A copy of the encoder with weights."""
        from transformers import AutoConfig, AutoModel

        folder = self.copy("encoder")
        AutoModel.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
        return folder

    def with_rows(self, split: str, *rows: dict[str, Any]) -> Command:
        """Train on the data with these rows after the good ones of a split."""
        folder = self.copy("data")
        with (folder / f"{split}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return self.train(f"data.dataset={folder}")


Case = Callable[[Place], Command]
CASES: list[Any] = []


def bad(*said: str) -> Callable[[Case], Case]:
    """Register a case; `said` are the parts that its message must have."""

    def register(case: Case) -> Case:
        CASES.append(pytest.param(case, said, id=case.__name__))
        return case

    return register


# Config


@bad("config.yaml: 1 problem", "training.learning_rte: unknown key", "did you mean 'learning_rate'?")
def unknown_key(place: Place) -> Command:
    return place.train(config="training: {learning_rte: 0.1}")


@bad("overrides: 2 problems", "lr: unknown section (did you mean 'training.learning_rate'?)", "'train_batch_size'?")
def override_that_is_misspelt(place: Place) -> Command:
    return place.train("lr=3e-5", "training.batch_size=8")


@bad("config.yaml and overrides: 2 problems", "training.learning_rte: unknown key", "lr: unknown section")
def wrong_in_file_and_override(place: Place) -> Command:
    return place.train("lr=3e-5", config="training: {learning_rte: 0.1}")


@bad("--training.seed=3: config keys have no dashes: write training.seed=3")
def override_with_dashes(place: Place) -> Command:
    return place.train("--training.seed=3")


@bad("--learning-rate: config keys have no dashes: write training.learning_rate=VALUE")
def key_as_an_option(place: Place) -> Command:
    return [*place.train(), "--learning-rate", "3e-5"]


@bad("tune.yaml: 1 problem", "is a sweep's config: give it to `emoray tune`")
def sweep_s_config_to_train(place: Place) -> Command:
    path = place.folder / "tune.yaml"
    path.write_text("search: {training.learning_rate: {loguniform: [1e-5, 1e-3]}}")
    return ["train", str(path)]


@bad("is no config, but data or a folder", "data.dataset=")
def data_instead_of_a_config(place: Place) -> Command:
    return ["train", str(place.data)]


@bad("trainnig: unknown section", "did you mean 'training'?")
def unknown_section(place: Place) -> Command:
    return place.train(config="trainnig: {learning_rate: 0.1}")


@bad("model.learning_rate: unknown key", "did you mean 'training.learning_rate'?")
def key_of_another_section(place: Place) -> Command:
    return place.train(config="model: {learning_rate: 0.1}")


@bad("training.7: unknown key")
def key_that_is_a_number(place: Place) -> Command:
    return place.train(config="training: {7: 0.1}")


@bad("training.logging_steps: is 'often', but must be a whole number")
def wrong_type(place: Place) -> Command:
    return place.train(config="training: {logging_steps: often}")


@bad("training.logging_steps: is True, but must be a number, not true or false")
def yes_for_a_number(place: Place) -> Command:
    return place.train(config="training: {logging_steps: yes}")


@bad("training.weight_decay: is -0.1, but should be greater than or equal to 0")
def impossible_value(place: Place) -> Command:
    return place.train("training.weight_decay=-0.1")


@bad("training.learning_rate: is inf, but should be")
def infinite_value(place: Place) -> Command:
    return place.train("training.learning_rate=.inf")


@bad("training.lr_scheduler_type: is 'triangle', but should be 'linear', 'cosine'", "'constant_with_warmup'")
def not_one_of_the_choices(place: Place) -> Command:
    return place.train("training.lr_scheduler_type=triangle")


@bad("run.name: is '../escape', but must be letters, digits, '.', '-' and '_'")
def name_that_leaves_the_folder(place: Place) -> Command:
    return place.train("run.name=../escape")


@bad("data: labels must hold at least two names, each once")
def label_named_twice(place: Place) -> Command:
    return place.train("data.labels=[glad, glad]")


@bad("5 problems", "training.num_epoch", "training.seed", "model.max_length", "'oops'", "workers.cpus: unknown key")
def many_problems_at_once(place: Place) -> Command:
    config = "training: {num_epoch: 1, seed: -1}\nmodel: {max_length: 1}\nworkers: {cpus: 2}"
    command = place.train("oops", config=config)
    return [argument for argument in command if not argument.startswith("model.max_length=")]


@bad("config.yaml", "not valid YAML", "line 2")
def broken_yaml(place: Place) -> Command:
    return place.train(config="run:\n  name: 'open\n")


@bad("config.yaml", "can't be read as UTF-8 text")
def config_in_latin_1(place: Place) -> Command:
    return place.train(config="run: {name: grün}".encode("latin-1"))


@bad("confg.yaml", "no such file", "did you mean 'config.yaml'?")
def missing_config(place: Place) -> Command:
    command = place.train()
    return [command[0], command[1].replace("config", "confg"), *command[2:]]


@bad("is no config, but data or a folder")
def folder_for_a_config(place: Place) -> Command:
    return ["train", str(place.folder)]


@bad("holds a list, but must hold sections such as 'training:'")
def list_for_a_config(place: Place) -> Command:
    return place.train(config="- run\n- model\n")


@bad("run: is 5, but must be a section")
def number_for_a_section(place: Place) -> Command:
    path = place.folder / "config.yaml"
    path.write_text("run: 5")
    return ["train", str(path)]


@bad("'training.seed' is not an override: write section.key=value")
def override_without_a_value(place: Place) -> Command:
    return place.train("training.seed")


@bad("training.seed.x", "'seed' holds 7, not a section")
def override_below_a_value(place: Place) -> Command:
    return place.train("training.seed=7", "training.seed.x=1")


@bad("data.labels: the value '[glad' is not valid YAML")
def override_that_is_no_yaml(place: Place) -> Command:
    return place.train("data.labels=[glad")


@bad("workers.num_workers is [1, 2]", "an elastic run needs training.global_batch_size")
def elastic_without_global_batch(place: Place) -> Command:
    return place.train("workers.num_workers=[1, 2]")


@bad("num_workers must be [min, max] with min <= max, not [4, 2]")
def range_upside_down(place: Place) -> Command:
    return place.train("workers.num_workers=[4, 2]")


@bad("workers.num_workers: is 0, but should be greater than or equal to 1")
def no_workers(place: Place) -> Command:
    return place.train("workers.num_workers=0")


@bad("training.global_batch_size is 2, less than one text for each of 3 workers", "raise it or lower")
def fewer_texts_than_workers(place: Place) -> Command:
    return place.train("training.global_batch_size=2", "workers.num_workers=3")


@bad("training.compact_vocabulary is on, but training.weight_decay also shrinks unused rows", "set")
def compact_vocabulary_with_decay(place: Place) -> Command:
    return place.train("training.compact_vocabulary=on", "training.weight_decay=0.01")


# Data


@bad("no such file or folder", "did you mean 'data'?", "correct data.dataset")
def no_such_data(place: Place) -> Command:
    return place.train(f"data.dataset={place.copy('data')}/../dta")


@bad(
    "'owner/data' is not a path here",
    "no copy of it is cached",
    "set data.dataset to a local file or folder",
    "HF_HOME",
)
def data_on_a_hub_out_of_reach(place: Place) -> Command:
    return place.train("data.dataset=owner/data")


@bad("is a URI, but data.dataset must be a local path or a Hub id")
def data_behind_a_uri(place: Place) -> Command:
    return place.train("data.dataset=s3://bucket/data")


@bad("train.jsonl: 2 lines with an empty text (lines 161, 162): every row needs a text")
def empty_text(place: Place) -> Command:
    return place.with_rows("train", {"text": "", "label": "sad"}, {"text": " \t", "label": "sad"})


@bad("train.jsonl: 1 line whose text is not a string (line 161)", "the first is 7")
def text_that_is_a_number(place: Place) -> Command:
    return place.with_rows("train", {"text": 7, "label": "sad"})


@bad("train.jsonl: 1 line without a label", "(line 161)", "every row needs a label")
def missing_label(place: Place) -> Command:
    return place.with_rows("train", {"text": "rain", "label": None})


@bad("validation.jsonl: 1 line with the label 'gald' (did you mean 'glad'?) (line 33)", "the labels are calm, cross")
def unknown_label(place: Place) -> Command:
    return place.with_rows("validation", {"text": "party", "label": "gald"})


@bad("no column 'txt'", "did you mean 'text'?", "its columns are text, label", "set data.text_column")
def unknown_column(place: Place) -> Command:
    return place.train("data.text_column=txt")


@bad("data: text_column and label_column are both 'text'")
def one_column_for_both(place: Place) -> Command:
    return place.train("data.label_column=text")


@bad("test.jsonl: 1 line not in UTF-8 (line 49)", "0xfc", "save the file as UTF-8")
def data_in_latin_1(place: Place) -> Command:
    folder = place.copy("data")
    with (folder / "test.jsonl").open("ab") as file:
        file.write('{"text": "grün", "label": "glad"}\n'.encode("latin-1"))
    return place.train(f"data.dataset={folder}")


@bad("train.jsonl: 1 line of broken JSON (line 161)", "each line must be one whole JSON object")
def broken_json(place: Place) -> Command:
    folder = place.copy("data")
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": "tea", "label": \n')
    return place.train(f"data.dataset={folder}")


@bad("2 lines with a wrong number of fields (lines 2, 3)", "the header has 2", "double quotes")
def csv_with_bare_commas(place: Place) -> Command:
    path = place.folder / "train.csv"
    path.write_text("text,label\nrain, rain,sad\nwell, well,glad\ntea,calm\n")
    return place.train(f"data.dataset={path}")


@bad("train: has only one label, 'sad', but there must be at least two")
def one_label_only(place: Place) -> Command:
    rows = [{"text": text, "label": "sad"} for text in sentences("sad")]
    return place.train(f"data.dataset={write_rows(place.folder / 'train.jsonl', rows)}")


@bad("too few different texts", "to cut validation and test out of train", "add rows")
def too_few_rows_to_cut(place: Place) -> Command:
    rows = [{"text": text, "label": label} for label in LABELS for text in sentences(label)[:2]]
    return place.train(f"data.dataset={write_rows(place.folder / 'train.jsonl', rows)}")


@bad("no train split among validation, test", "train.jsonl")
def no_train_split(place: Place) -> Command:
    folder = place.copy("data")
    (folder / "train.jsonl").unlink()
    return place.train(f"data.dataset={folder}")


@bad("train.jsonl: is empty: remove the file or fill it")
def empty_file(place: Place) -> Command:
    folder = place.copy("data")
    (folder / "train.jsonl").write_text("")
    return place.train(f"data.dataset={folder}")


@bad("the folder holds no file that ends in .jsonl", ".parquet")
def folder_without_data(place: Place) -> Command:
    folder = place.folder / "empty"
    folder.mkdir()
    return place.train(f"data.dataset={folder}")


@bad("'rows.xlsx' ends in '.xlsx', but only .jsonl", "convert it")
def spreadsheet(place: Place) -> Command:
    path = place.folder / "rows.xlsx"
    path.write_bytes(b"PK")
    return place.train(f"data.dataset={path}")


@bad("is not a readable Parquet file", "write it again")
def torn_parquet(place: Place) -> Command:
    path = place.folder / "train.parquet"
    path.write_bytes(b"PAR1 and no more")
    return place.train(f"data.dataset={path}")


@bad("train.jsonl: 1 line without a label")
def check_data_says_the_same(place: Place) -> Command:
    place.with_rows("train", {"text": "rain"})
    return ["check-data", str(place.folder / "data")]


# Model


@bad("bert: no such folder (", "give a Hugging Face folder, or a Hub id (owner/name)")
def no_such_encoder(place: Place) -> Command:
    return place.train(f"model.pretrained={place.folder}/bert")


@bad("owner/bert: no such folder here, and its config couldn't be fetched from the Hub", "HF_HOME")
def encoder_on_a_hub_out_of_reach(place: Place) -> Command:
    return place.train("model.pretrained=owner/bert")


@bad("the config can't be loaded from this folder", "config.json")
def encoder_without_config(place: Place) -> Command:
    folder = place.copy("encoder")
    (folder / "config.json").unlink()
    return place.train(f"model.pretrained={folder}")


@bad("the config can't be loaded from this folder", "JSON")
def encoder_with_torn_config(place: Place) -> Command:
    folder = place.copy("encoder")
    (folder / "config.json").write_text('{"model_type": "bert", ')
    return place.train(f"model.pretrained={folder}")


@bad("the config can't be loaded from this folder", "bertie")
def encoder_of_an_unknown_kind(place: Place) -> Command:
    folder = place.copy("encoder")
    (folder / "config.json").write_text('{"model_type": "bertie"}')
    return place.train(f"model.pretrained={folder}")


@bad("is a clip_vision_model, of which transformers makes no text classifier")
def encoder_of_pictures(place: Place) -> Command:
    folder = place.copy("encoder")
    (folder / "config.json").write_text('{"model_type": "clip_vision_model"}')
    return place.train(f"model.pretrained={folder}")


@bad("has no fast tokenizer (tokenizer.json or vocab.txt), which emoray needs")
def encoder_without_tokenizer(place: Place) -> Command:
    folder = place.copy("encoder")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    return place.train(f"model.pretrained={folder}")


@bad("the tokenizer can't be loaded from this folder")
def encoder_with_torn_tokenizer(place: Place) -> Command:
    folder = place.copy("encoder")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:200])
    return place.train(f"model.pretrained={folder}")


@bad("model.max_length is 65", "has 64 positions: lower it")
def longer_than_the_positions(place: Place) -> Command:
    return place.train("model.max_length=65")


@bad("the tokenizer has", "pieces, but the encoder has rows for 50: give the tokenizer that belongs")
def tokenizer_larger_than_embeddings(place: Place) -> Command:
    folder = place.copy("encoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    return place.train(f"model.pretrained={folder}")


@bad("the weights can't be loaded from this folder", "model.safetensors")
def encoder_without_weights(place: Place) -> Command:
    return place.train("model.from_scratch=false")


@bad("the weights can't be loaded from this folder", "model.safetensors")
def encoder_with_pickled_weights(place: Place) -> Command:
    folder = place.copy("encoder")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return place.train("model.from_scratch=false", f"model.pretrained={folder}")


@bad("the weights can't be loaded from this folder")
def encoder_with_torn_weights(place: Place) -> Command:
    folder = place.with_weights()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return place.train("model.from_scratch=false", f"model.pretrained={folder}")


@bad("the weights don't fit: bert.", "has the shape [32", "but must have [16", "by config.json")
def encoder_with_weights_of_another_shape(place: Place) -> Command:
    folder = place.with_weights()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    return place.train("model.from_scratch=false", f"model.pretrained={folder}")


@bad("16 of the encoder's weights are missing", "bert.encoder.layer.1.", "model.from_scratch=true")
def encoder_without_its_second_layer(place: Place) -> Command:
    from safetensors.torch import load_file, save_file

    folder = place.with_weights()
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layer.1." not in k}, folder / "model.safetensors", {"format": "pt"})
    return place.train("model.from_scratch=false", f"model.pretrained={folder}")


@bad("columns of the data: 1 problem", "text_column and label_column are both 'label': name two columns")
def one_column_for_texts_and_labels(place: Place) -> Command:
    return ["evaluate", str(place.run), "--data", str(place.data), "--text-column", "label"]


# Trained models


@bad("no such folder", "did you mean 'tiny'", "give a run's folder or name, its best/")
def no_such_model(place: Place) -> Command:
    return ["classify", str(place.run.parent / "tyni"), "tea"]


@bad("holds no model: no manifest.json there or in best/")
def model_of_somebody_else(place: Place) -> Command:
    return ["classify", str(place.with_weights()), "tea"]


@bad("this run isn't finished, so it has no best/ yet; give one of its checkpoints")
def unfinished_run(place: Place) -> Command:
    shutil.rmtree(place.copy("run") / "best")
    return ["classify", str(place.folder / "run"), "tea"]


@bad("model.safetensors: its sha256 differs", "the file is damaged")
def model_with_one_bit_flipped(place: Place) -> Command:
    weights = place.copy("run") / "best" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    return ["classify", str(place.folder / "run"), "tea"]


@bad("config.json: is missing, but manifest.json lists it")
def model_without_a_file(place: Place) -> Command:
    (place.copy("run") / "best" / "config.json").unlink()
    return ["evaluate", str(place.folder / "run")]


@bad("emoray.json", "it is not a model that emoray trained")
def summed_up_folder_without_facts(place: Place) -> Command:
    from emoray import checkpoint

    folder = place.with_weights()
    (folder / "manifest.json").write_text(json.dumps({"files": checkpoint.sums(folder)}))
    return ["classify", str(folder), "tea"]


@bad("pyarrow can't open this storage", "ftps://host/model")
def model_behind_an_unknown_scheme(place: Place) -> Command:
    return ["classify", "ftps://host/model", "tea"]


@bad("with the label 'bored'", "the labels are calm, cross, glad, sad")
def evaluation_on_other_labels(place: Place) -> Command:
    path = write_rows(place.folder / "rows.jsonl", [{"text": "tea", "label": "bored"}])
    return ["evaluate", str(place.run), "--data", str(path)]


@bad("nowhere/report.html", "can't be written")
def report_into_a_missing_folder(place: Place) -> Command:
    return ["evaluate", str(place.run), "--report", str(place.folder / "nowhere" / "report.html")]


# Run


@bad("exists, and run.on_existing is fail: choose another run.name")
def run_that_exists(place: Place) -> Command:
    place.copy("run")
    return place.train("run.name=run", f"run.storage_path={place.folder}", "run.on_existing=fail")


@bad(
    "holds a run of another recipe",
    "training.learning_rate was 0.002, is 0.001",
    "training.seed was 42, is 7",
    "Restore the old values, choose another run.name, or set run.on_existing=replace",
)
def run_of_another_recipe(place: Place) -> Command:
    place.copy("run")
    changes = ["training.learning_rate=1e-3", "training.seed=7"]
    return place.train("run.name=run", f"run.storage_path={place.folder}", *changes)


@bad("the data was", "fingerprint")
def run_of_other_data(place: Place) -> Command:
    place.copy("run")
    command = place.with_rows("train", {"text": "one more cup of tea", "label": "calm"})
    return [*command, "run.name=run", f"run.storage_path={place.folder}"]


@bad("attempts/000001.json", "is damaged", "run.on_existing=replace")
def run_with_a_torn_attempt(place: Place) -> Command:
    (place.copy("run") / "attempts" / "000001.json").write_text('{"host": ')
    return place.train("run.name=run", f"run.storage_path={place.folder}")


@bad("results.json", "is damaged", "delete it")
def run_with_torn_results(place: Place) -> Command:
    (place.copy("run") / "results.json").write_text('{"epochs": ')
    return place.train("run.name=run", f"run.storage_path={place.folder}")


@bad("a-file/bad: can't be written", "a-file is not a folder; choose another place")
def storage_below_a_file(place: Place) -> Command:
    (place.folder / "a-file").write_text("in the way")
    return place.train(f"run.storage_path={place.folder / 'a-file'}")


@bad("runs/bad is not a folder; choose another place")
def file_where_the_run_goes(place: Place) -> Command:
    (place.folder / "runs").mkdir()
    (place.folder / "runs" / "bad").write_text("in the way")
    return place.train()


@bad("holds no run (letters.txt), so run.on_existing=replace does not delete it")
def replacing_what_is_no_run(place: Place) -> Command:
    (place.folder / "letters").mkdir()
    (place.folder / "letters" / "letters.txt").write_text("dear")
    return place.train("run.name=letters", f"run.storage_path={place.folder}", "run.on_existing=replace")


@bad("ftps://host/runs", "pyarrow can't open this storage")
def storage_behind_an_unknown_scheme(place: Place) -> Command:
    return place.train("run.storage_path=ftps://host/runs")


@pytest.fixture
def place(tmp_path: Path, tiny_encoder: Path, tiny_data: Path, trained_run: Path, tiny_overrides: list[str]) -> Place:
    return Place(tmp_path, tiny_encoder, tiny_data, trained_run, tiny_overrides)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray fails the test."""
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("ray was started"))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is out of reach, and nobody asks the network whether it is."""
    monkeypatch.setattr(hub, "_answers", lambda: False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("case", "said"), CASES)
@pytest.mark.usefixtures("no_ray")
def test_is_one_message_and_leaves_nothing(case: Case, said: tuple[str, ...], place: Place, emoray: Emoray) -> None:
    command = case(place)
    before = contents(place.folder), contents(place.run)
    answer = emoray(*command)
    assert answer.status == 1, answer
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert answer.err.count("error: ") == 1
    message = answer.err[answer.err.index("error: ") :]
    for part in said:
        assert part in message
    assert (contents(place.folder), contents(place.run)) == before
    assert not (place.folder / "runs" / "bad").is_dir()


def test_there_are_enough_kinds() -> None:
    assert len(CASES) >= 35


# Cluster


@pytest.fixture(scope="module")
def ray_settings() -> Iterator[None]:
    """Ray's files in a folder with a short name (its sockets allow no long one), no token, no telemetry."""
    folder = tempfile.mkdtemp(prefix="er-")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a cluster of one node were joined; tests/ray/test_disturbed.py asks a real one."""
    from emoray.on_ray import cluster

    monkeypatch.setattr(cluster, "connect", lambda: False)
    monkeypatch.setattr(cluster, "dashboard", lambda: None)
    monkeypatch.setattr(cluster, "live_nodes", lambda: [{"CPU": 2.0, "memory": 1e9}])


@pytest.mark.usefixtures("ray_settings")
def test_a_cluster_that_is_not_there(place: Place, emoray: Emoray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    answer = emoray(*place.train())
    assert answer.status == 1 and answer.out == ""
    assert "error: Can't reach the cluster at RAY_ADDRESS=127.0.0.1:1: [Errno 111] Connection refused" in answer.err
    assert "Check that it runs" in answer.err and "Traceback" not in answer.err
    assert not (place.folder / "runs").exists()


@pytest.mark.usefixtures("ray_settings")
def test_ray_that_does_not_start(place: Place, emoray: Emoray, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:  # as Ray does it where its dashboard lacks a module: a bare exception
        raise Exception("The current node timed out during startup. This could happen because\nof many things.")

    monkeypatch.setattr("ray.init", fail)
    answer = emoray(*place.train())
    assert answer.status == 1 and answer.out == ""
    assert "error: Can't reach a Ray cluster: The current node timed out during startup." in answer.err
    assert "session_latest/logs" in answer.err and "Traceback" not in answer.err


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["workers.num_workers=50"], ["asks for 50 x (1 CPU, 0 GPU)", "has room for 2", "lower workers.num_workers"]),
        (["workers.cpus_per_worker=64"], ["asks for 1 x (64 CPU, 0 GPU)", "room for 0", "workers.cpus_per_worker"]),
        (["workers.use_gpu=true"], ["asks for 1 x (1 CPU, 1 GPU)", "room for 0", "set workers.use_gpu=false"]),
        (
            ["workers.num_workers=[3, 5]", "training.global_batch_size=16"],
            ["asks for 3 x", "has room for 2", "workers.wait_for_nodes_s where an autoscaler brings them"],
        ),
    ],
    ids=["workers", "cpus", "gpus", "elastic"],
)
def test_more_than_the_cluster_has(overrides: list[str], said: list[str], place: Place, emoray: Emoray) -> None:
    answer = emoray(*place.train(*overrides))
    assert answer.status == 1 and answer.out == ""
    message = answer.err[answer.err.index("error: ") :]
    for part in [*said, "node 1: 2 CPU, 0 GPU"]:
        assert part in message
    assert "Traceback" not in answer.err
    assert not (place.folder / "runs").exists()
