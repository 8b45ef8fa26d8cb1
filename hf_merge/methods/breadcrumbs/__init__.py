from ...registry import register_merge_method
from .config import BreadcrumbsConfig
from .method import Breadcrumbs


__all__ = ["Breadcrumbs", "BreadcrumbsConfig"]

register_merge_method(name="breadcrumbs", config_cls=BreadcrumbsConfig, method_cls=Breadcrumbs)
