"""Images with boxes: COCO, VOC, YOLO."""
