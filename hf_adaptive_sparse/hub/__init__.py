"""The Hub: push a folder in one commit, inspect a repo without its weights, read a license."""

from hf_adaptive_sparse.hub.errors import HubError
from hf_adaptive_sparse.hub.inspection import Inspection, ModuleInspection
from hf_adaptive_sparse.hub.push import push_folder, push_token
from hf_adaptive_sparse.hub.reading import inspect

__all__ = ["HubError", "Inspection", "ModuleInspection", "inspect", "push_folder", "push_token"]
