"""The table of bad inputs and faults, 40 rows of at least 300 cases; docs/errors.md is written from it.

    python -m tests.fault_rows            # tries every case (minutes), writes docs/errors.md

A row is an input or a fault, what to do about it, its cases, and the tests of what gives no message: that a picture
comes out right, that a batch goes on. tests/test_faults.py tries the cases.
"""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests import bad_loras as bad
from tests import fault_files as f
from tests import fault_runs as r
from tests.fault_files import Bench, Case

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
BOTH = ("no down", "no up", "ranks differ", "too narrow", "one NaN", "1e30")


@dataclass(frozen=True)
class Row:
    """tests: "file::function" of what is proved elsewhere; of a class of cases here the message alone is shown."""

    number: int
    what: str
    do: str
    cases: list[Case] = field(default_factory=list)
    tests: tuple[str, ...] = ()


DOWNLOAD = "Download the file again, whole, from where it is published."
REPORT = "Ask who made the file for another one; the named part of it is wrong."
TRAINER = "Save the LoRA again from its trainer; the named tensor or field cannot be used as it is."


@functools.cache
def rows() -> list[Row]:
    """All rows, in order."""
    t = functools.partial(f.drafts, bad.TENSORS, "diffusers", "unet")

    def kohya(table, *names):
        return f.drafts(table, "kohya", "unet", *names)

    return [
        Row(1, "Not a LoRA file: empty, a few bytes, noise", DOWNLOAD,
            f.whole_files("0 bytes", "1 bytes", "2 bytes", "7 bytes", "8 bytes", "9 bytes", "header cut", "noise",
                          "zeros")),
        Row(2, "Truncated, or with bytes after its end", DOWNLOAD,
            f.whole_files("cut*", "1 byte too long", "1 MB too long", "two files in one")),
        Row(3, "A header of a wrong or an enormous length", REPORT,
            f.whole_files("length*", "header*"),
            ("test_admit_paths.py::test_a_claimed_header_is_not_allocated",)),
        Row(4, "A header that is no JSON object", REPORT,
            f.whole_files("no JSON", "not UTF-8", "UTF-16", "byte order mark", "leading blank", "a *", "null", "deep*",
                          "single quotes", "trailing comma", "two documents", "NUL after it", "NaN for an entry",
                          "number of*")),
        Row(5, "Entries of the header that contradict themselves or each other", REPORT,
            f.entries("dtype '*", "dtype 3", "dtype None", "dtype []", "dtype {}", "dtype F64,*", "dtype F16,*",
                      "shape*", "offsets*", "unknown field", "without*", "no fields")),
        Row(6, "A name that occurs twice", REPORT,
            [*f.whole_files("key twice", "metadata twice", "metadata name twice", "field twice"),
             *f.texts("a name twice")]),
        Row(7, "No tensors at all", "Check that the training was saved; the file is a shell.",
            f.whole_files("no tensors", "only metadata")),
        Row(8, "Too many tensors, hostile names of tensors", REPORT, [*f.many_tensors(), *f.names()],
            ("test_admit.py::test_too_many_tensors",
             "test_admit.py::test_as_many_tensors_as_are_allowed_take_no_time_that_grows_with_their_square")),
        Row(9, "A file above a limit, by its apparent size", "Choose a smaller LoRA. On a server of your own, raise "
            "the limit that is named.", [*f.sparse(), *f.limits(), *f.stores()],
            ("test_admit_paths.py::test_a_sparse_file_counts_in_full",)),
        Row(10, "Another kind of file: a pickle, an archive, a web page", "Only .safetensors files are read. Look for "
            "one where you got this file, or convert it where you trust it.",
            [*f.whole_files("pickle*", "torch.save", "zip", "gzip", "7z", "rar", "LFS*", "web*", "XML*", "JSON text",
                            "GGUF", "NumPy", "HDF5", "PNG", "JPEG", "program", "script"), *f.other_suffixes()]),
        Row(11, "A path out of the library, or to what is no regular file", "Name a file inside the library, by a "
            "path relative to it.", [*f.paths(), *f.no_paths()],
            ("test_admit_paths.py::test_links_out_of_a_peft_folder",
             "test_admit_paths.py::test_a_link_that_appears_after_the_check_is_not_followed")),
        Row(12, "A folder with two candidates; a name that is not here", "Name the file itself. Nothing is looked up "
            "on a hub: download it first.", f.ambiguous(),
            ("test_admit_paths.py::test_a_name_on_a_hub_is_never_looked_up",)),
        Row(13, "A file that changes while it is read, or afterwards", "Use it again when it is whole. What was read "
            "before does not change.", [],
            ("test_admit_paths.py::test_a_file_that_changes_while_it_is_read",
             "test_admit_paths.py::test_what_was_read_does_not_change_with_its_file",
             "test_resident.py::test_a_changed_file_is_loaded_again_and_blocks_keep_theirs")),
        Row(14, "A LoRA of another base model", "Use it with the base that is named, or take another LoRA.",
            f.other_families(), ("test_bad_input.py::test_a_lora_for_another_base",)),
        Row(15, "Keys that name no layer or no tensor of a LoRA", "Check the base. `allow_partial` reads the rest.",
            t("layer that is not there", "unknown end", "a whole weight")),
        Row(16, "One half of a pair is missing", TRAINER,
            [*t("no down", "no up"), *kohya(bad.ALPHAS, "alone")]),
        Row(17, "Shapes and ranks that do not agree with each other or the layer", TRAINER,
            [*t("ranks differ", "too*", "transposed", "down a*", "up a*", "3 x 3 kernel", "kernel on up",
                "a bias too long"), *kohya(bad.PRODUCTS, "LoHa of*", "LoKr of*",
                "a difference of another shape", "a core of another rank")]),
        Row(18, "Ranks of 0 or above the limit", "Shrink it: `multilora resize --rank N`.",
            [*t("rank 1025"), *f.configs("r 0", "r -4", "r 8", "rank_pattern of another rank")],
            ("test_admit.py::test_a_rank_above_the_layer_is_read_with_a_note",)),
        Row(19, "Values that are NaN or infinite", "The training has failed; use an earlier step of it.",
            t("one NaN*", "one infinity", "one minus infinity", "all NaN")),
        Row(20, "Values that overflow in half precision", "The training has failed, or a scale was applied twice.",
            [*t("1e30", "-1e30", "1e300*", "65505", "10^4*"),
             *kohya(bad.PRODUCTS, "a difference with 1e30")]),
        Row(21, "Kinds of numbers that are not read", "Save it in float32, float16 or bfloat16.",
            [*t("int weight", "bool weight", "float8 weight", "complex weight"),
             *f.entries("dtype I*", "dtype U*", "dtype BOOL", "dtype C64", "dtype F8*")],
            ("test_admit.py::test_other_precisions_are_read_and_a_whole_alpha",)),
        Row(22, "Alphas that are no number or out of bounds", TRAINER,
            kohya(bad.ALPHAS, *[n for n in bad.ALPHAS if n != "alone"]),
            ("test_admit.py::test_alpha_zero_or_negative_is_read_with_a_warning",)),
        Row(23, "Adapters of other types, incomplete ones", "Only low-rank updates, LoHa, LoKr, DoRA, biases and "
            "differences are read, and only whole ones.",
            [*t("factors and a*", "LoHa beside it", "LoKr beside it", "a magnitude*", "OFT", "BOFT", "IA3", "VeRA",
                "modules_to_save", "trainable tokens", "textual inversion", "GLoRA"),
             *kohya(bad.PRODUCTS, "LoHa without*", "LoHa with*", "LoKr without*", "LoKr with w2*")]),
        Row(24, "A configuration that asks for more than its tensors are", "Its file does not decide what is done: "
            "what is named must agree with the tensors, or go.",
            f.configs("peft_type*", "modules_to_save", "trainable*", "layer_rep*", "target_par*", "megatron", "aLoRA",
                      "pissa", "olora", "use_*", "r 2*", "r 1*", "r of*", "r '*", "r [*", "r {*", "r True", "r NaN",
                      "lora_alpha*"),
            ("test_admit.py::test_metadata_drives_nothing",)),
        Row(25, "Patterns that would take forever", "Name the layers themselves.",
            [*f.configs("rank_pattern a*", "alpha_pattern a*"), *f.names("([a-z_.0-9]+)+X*")],
            ("test_admit.py::test_as_many_patterns_as_layers_are_no_quadratic_search",)),
        Row(26, "Metadata that is no JSON, too deep or too large", "Save the file without its metadata.",
            [*f.whole_files("metadata null*", "metadata []*", "metadata 1*", 'metadata "*', "metadata {*"),
             *f.texts("no JSON", "empty", "a web page", "a list", "a text", "null", "deep", "9 deep", "number of*"),
             *f.configs("nested*", "1 MB")],
            ("test_admit.py::test_metadata_drives_nothing",
             "test_admit.py::test_any_text_becomes_one_harmless_line")),
        Row(27, "Hostile names of files, labels and sessions", "Give the file a plain name.",
            [*f.hostile_file_names(), *[c for c in r.queues() if c.name.startswith("session")]],
            ("test_admit_paths.py::test_a_label_is_shown_and_never_a_path",
             "test_web_compose.py::test_names_from_files_cannot_become_markup")),
        Row(28, "The same file twice, or two of one name", "Give one of them another name.", [],
            ("test_admit_paths.py::test_a_store_keeps_each_content_once_under_its_hash",
             "test_admit_paths.py::test_threads_that_add_the_same_file_make_one",
             "test_web_compose.py::test_two_loras_of_one_name_get_two_names")),
        Row(29, "A good part for the U-Net, a bad one for the text encoder", "All of a file is read or nothing. " +
            TRAINER, f.drafts(bad.TENSORS, "diffusers", "text_encoder", *BOTH)),
        Row(30, "Arguments of a picture, a LoRA, a request", "Change the named argument to what the message allows.",
            [*r.pictures(), *r.requests(), *r.references(), *r.batch_lines()]),
        Row(31, "Two people at once", "Nothing: each gets the picture of a lone run.", [],
            ("test_lifecycle.py::test_two_threads_with_one_composer_get_what_each_would_have_got_alone",
             "test_lifecycle.py::test_pipelines_that_share_a_text_encoder_or_scheduler_do_not_mix",
             "test_service_long.py::test_two_users_at_once_each_get_what_they_would_have_got_alone",
             "test_faults_long.py::test_eight_clients_at_once")),
        Row(32, "Loading at the same time in one process", "Nothing.", [],
            ("test_resident.py::test_many_threads_get_what_they_asked_for",
             "test_admit_paths.py::test_threads_that_add_the_same_file_make_one",
             "test_faults_steps.py::test_threads_that_load_at_once_change_no_class_of_torch")),
        Row(33, "An exception, a cancel, an interrupt at any step", "Ask again; nothing is left of it.", [],
            ("test_faults_steps.py::test_a_fault_at_a_step_of_a_method",
             "test_lifecycle.py::test_nothing_is_left_after_an_error",
             "test_lifecycle.py::test_cancel_at_each_step")),
        Row(34, "Loading, removing or composing while something is composed", "Wait for the first one.", [],
            ("test_lifecycle.py::test_composing_inside_composing_is_refused",
             "test_attach.py::test_two_users_at_once_are_refused",
             "test_attach_hosts.py::test_loaded_adapters_are_taken_over_and_given_back")),
        Row(35, "Applying and taking back, thousands of times", "Nothing: the base never drifts.", [],
            ("test_attach.py::test_a_thousand_cycles_in_bfloat16_change_no_bit",
             "test_faults_long.py::test_apply_and_restore")),
        Row(36, "Not enough memory; NaN in a prediction", "Smaller size, fewer LoRAs, lower weights, float32; in this "
            "order.", r.engines(),
            ("test_service_engine.py::test_out_of_memory_takes_fewer_passes_and_the_recipe_says_so",
             "test_faults_steps.py::test_a_fault_at_a_step_of_a_method")),
        Row(37, "A killed driver or worker of a batch", "Run the same command again.", [],
            ("test_batch.py::test_sigterm_finishes_the_item",
             "test_batch.py::test_an_item_that_kills_its_process_is_left_alone",
             "test_batch_ray.py::test_driver_and_workers_killed_in_turn")),
        Row(38, "A full, failing or read-only disk; an output over an input", "Make room, or give another place; then "
            "run the same command again.", [*r.saves(), *[c for c in r.batches() if "folder with" not in c.name]],
            ("test_batch_disks.py::test_a_full_disk_under_the_journal",)),
        Row(39, "A batch that goes on under another plan; a torn journal", "Give another --out, or the recipes and "
            "settings of before. A torn journal is made again from the pictures.",
            [c for c in r.batches() if "folder with" in c.name],
            ("test_batch_disks.py::test_a_torn_journal_is_made_again_from_the_pictures",
             "test_batch.py::test_order_shards_and_grouping_change_no_picture")),
        Row(40, "A worker of a server that dies or hangs; a server that is full", "Ask again, in a minute where it "
            "says so.", [*[c for c in r.queues() if not c.name.startswith("session")], *r.workers()],
            ("test_service.py::test_a_worker_killed_in_mid_picture_is_replaced_and_the_picture_made",
             "test_service_door.py::test_a_refusal_is_gradio_s_own_kind_and_gradio_is_not_asked",
             "test_batch_ray.py::test_a_killed_actor_is_replaced_and_its_item_not_blamed")),
    ]  # fmt: skip


def said(case: Case, bench: Bench, folder: Path) -> str:
    """What a case says, without what is of this machine alone."""
    text = " ".join(case.say(bench, folder).split())
    assert case.words.replace("\\", "") in text or re.search(case.words, text), (case.name, case.words, text)
    text = re.sub(r"(Nearest: [^,.]+)[^.]*\.|Known: [^.]*\.", r"\1 …", text)  # lists of all methods grow
    text = re.sub(r"process \d+ on \S+, since [-\d: +]+", "process N on HOST, since TIME", text)
    return re.sub(r"\d\.\d+ seconds", "N seconds", text.replace(str(folder), "FOLDER"))


def line(case: Case, message: str) -> str:
    """The row of the page for a case."""
    shown = message if len(message) <= 300 else message[:299] + "…"
    return f"| {_plain(case.name)} | {_plain(shown)} |"


def _plain(text: str) -> str:
    """Text for a cell of a Markdown table, shown literally."""
    text = text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", text)


def page(messages: dict[tuple[int, str], str]) -> str:
    """docs/errors.md. messages: (number of the row, name of the case) -> what was said."""
    total = sum(len(row.cases) for row in rows())
    out = [
        "# Errors",
        "What can go wrong with a file, a request, a run or a machine; what multilora says then; what to do. After "
        "each of them the model, the files and other people's requests are as before: the tests make every case "
        f"happen and look. {len(rows())} rows, {total} cases.",
        "*Written by `python -m tests.fault_rows` from what was really said. Do not edit.*",
    ]
    for row in rows():
        out.append(f"## {row.number}. {row.what}")
        out.append(f"**What to do.** {row.do}")
        if row.cases:
            table = [line(case, messages[row.number, case.name]) for case in row.cases]
            out.append("\n".join(["| cause | message |", "| --- | --- |", *table]))
        if row.tests:
            out.append("Tests of what gives no message: " + ", ".join(f"`{name}`" for name in row.tests) + ".")
    return "\n\n".join(out) + "\n"


def gathered() -> dict[tuple[int, str], str]:
    """Every case, tried."""
    bench, found = Bench(), {}
    for row in rows():
        for case in row.cases:
            with tempfile.TemporaryDirectory(prefix="fault") as folder:
                found[row.number, case.name] = said(case, bench, Path(folder))
    return found


if __name__ == "__main__":
    PAGE.write_text(page(gathered()), encoding="utf-8")
