"""Complete a low-rank matrix from some of its entries."""

from .fit_completion import CompletionFit as CompletionFit, fit_completion as fit_completion
