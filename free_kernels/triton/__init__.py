"""The ops as Triton kernels; nothing here is imported before an op asks for it, and importing it needs Triton."""
