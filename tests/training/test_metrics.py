"""The id of a run at Weights & Biases belongs to its directory and to no other."""

from contrastive_jax.training.metrics import wandb_id


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
