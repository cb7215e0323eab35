# SPDX-License-Identifier: Apache-2.0
"""What a run says: on the console, to trackers, and in the files beside its weights."""
