# SPDX-License-Identifier: Apache-2.0
"""A page in the browser that shows what models see in an image: here, or as a Space of the Hub."""
