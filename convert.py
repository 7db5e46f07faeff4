"""Imports weights of other libraries, and exports runs to them.

python convert.py --from=huggingface:FOLDER --to=runs/imported
python convert.py --from=open_clip:FILE --to=runs/imported [--tokenizer=clip:bpe_simple_vocab_16e6.txt.gz]
python convert.py --from=big_vision:FILE.npz --to=runs/imported --tokenizer=sentencepiece:FILE.model
python convert.py --from=runs/emoji_clip --to=huggingface:FOLDER   # a run of configs/emoji_clip.py; or open_clip:FOLDER
"""

from absl import flags

from contrastive_jax import cli, paths
from contrastive_jax.errors import UserError
from contrastive_jax.interop import checkpoint_files, exports, imports, tokenizer_files
from contrastive_jax.loading import load

FROM = flags.DEFINE_string("from", None, "A run, or KIND:PATH with KIND huggingface, open_clip or big_vision.")
TO = flags.DEFINE_string("to", None, "A new run, or KIND:FOLDER with KIND huggingface or open_clip.")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "KIND:FILE, where none lies beside the weights.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a run; the newest if not given.", lower_bound=0)


def main() -> None:
  if not FROM.value or not TO.value:
    raise UserError("--from and --to are needed, such as --from=runs/emoji_clip --to=huggingface:exported")
  inward, outward = _is_foreign(FROM.value, imports.READERS), _is_foreign(TO.value, exports.WRITERS)
  if inward == outward:
    raise UserError(
      f"--from={FROM.value} and --to={TO.value}: one of them is a run and the other KIND:PATH, KIND one of"
      f" {', '.join(imports.READERS)}"
    )
  idle = STEP if inward else TOKENIZER
  if idle.present:
    raise UserError(f"--{idle.name} has no meaning for an {'import' if inward else 'export'}: leave it out")
  if inward:
    workdir = paths.folder_to_write("--to", TO.value)
    checkpoint_files.require_new(workdir)
    imported = imports.read(FROM.value, TOKENIZER.value)
    imports.save(imported, workdir)
    if "image" in imported.params:
      print(f"{workdir} holds {imported.name}: contrastive_jax.load, eval.py and init_from open it like a run.")
    else:
      print(f"{workdir} holds the text tower of {imported.name}: name it as init_from, with init_towers='text'.")
    return
  kind, _, folder = TO.value.partition(":")
  target = paths.folder_to_write("--to", folder)
  checkpoint_files.require_new(target)
  model = load(paths.run_to_read("--from", FROM.value), STEP.value)
  family = exports.write(
    f"{kind}:{target}", model.config, model.params, model.tokenizer, resolution=model.views.resolution
  )
  print(f"{TO.value} holds step {model.step} of {FROM.value} as {family}.")
  odd = tokenizer_files.cleaned_otherwise(model.tokenizer, kind)
  if odd:
    print(f"Its tokenizer there reads {' and '.join(odd)} in captions otherwise than the run's: see docs/interop.md.")


def _is_foreign(spec: str, kinds: dict) -> bool:
  return spec.partition(":")[0] in kinds and ":" in spec


if __name__ == "__main__":
  cli.run(main)
