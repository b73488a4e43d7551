"""What gradients say of a loss: curvature, Fisher information, kernels, coherence."""

from .fisher import diagonal_fisher as diagonal_fisher
from .gradient_coherence import (
    GradientCoherence as GradientCoherence,
    gradient_coherence as gradient_coherence,
)
from .hessian import (
    HessianOverlap as HessianOverlap,
    HessianSpace as HessianSpace,
    hessian_overlap as hessian_overlap,
    hessian_space as hessian_space,
)
from .tangent_kernel import (
    KernelChange as KernelChange,
    kernel_alignment as kernel_alignment,
    kernel_change as kernel_change,
    relative_change as relative_change,
    tangent_kernel as tangent_kernel,
)
