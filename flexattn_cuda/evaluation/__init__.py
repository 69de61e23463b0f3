"""Evaluation with lmms-eval: this package's models in it, and tasks that it does not have.

lmms-eval finds the model by an entry point, and the tasks in the folder that `python -m flexattn_cuda.evaluation`
prints. Only `model`, `registration`, `folder_tasks` and `run` import lmms-eval, and nothing but lmms-eval and
`flexattn eval` imports them.
"""
