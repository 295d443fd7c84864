"""Find the residual sites of a model and let them rest, reversibly.

`sites` lists what can rest and proves it, `apply` makes it rest, `handle_of` finds the handle again.
"""

from fallow.surgery.apply import apply, sites
from fallow.surgery.handle import Handle, handle_of
from fallow.surgery.report import Report
from fallow.surgery.site import Site, Sites

__all__ = ["Handle", "Report", "Site", "Sites", "apply", "handle_of", "sites"]
