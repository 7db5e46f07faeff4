"""What a run sends elsewhere: its id at Weights & Biases is that of its directory, and TensorBoard takes any number."""

import math

from contrastive_jax.training.metrics import Board, wandb_id


def test_runs_of_one_name_have_ids_of_their_own_that_last(tmp_path):
  folders = [tmp_path / "a/seed1", tmp_path / "b/seed1", tmp_path / "c/od d#?"]
  for folder in folders:
    folder.mkdir(parents=True)
  ids = [wandb_id(folder) for folder in folders]
  assert len(set(ids)) == 3 and ids == [wandb_id(folder) for folder in folders]
  assert not any(set(chosen) & set("/\\#?%: ") for chosen in ids)


def test_a_run_that_logged_before_keeps_its_name(tmp_path):
  (tmp_path / "seed1" / "wandb").mkdir(parents=True)
  assert wandb_id(tmp_path / "seed1") == "seed1"
  assert wandb_id(tmp_path / "seed1") == "seed1"


def test_the_board_takes_numbers_that_are_not_finite_without_a_word(tmp_path, caplog):
  board = Board(tmp_path, purge_step=None)
  for step in range(3):
    board.write({"loss": math.nan, "grad_norm": math.inf}, step)
  board.close()
  assert not caplog.records and board.dropped == 0
  assert len(list(tmp_path.iterdir())) == 1
