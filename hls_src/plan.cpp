// The plan of a task and the geometry of its tiles.
#include "design.h"

namespace kgrc {

// Tile number (d, h, w) along the axes.
Tile make_tile(const Task& task, int d, int h, int w) {
  Tile tile;
  const int number[3] = {d, h, w};
  int extent[3], reach[3];
axes:
  for (int axis = 0; axis < 3; ++axis) {
    const int size = task[Field(kTileD + axis)], out = task[Field(kOutD + axis)];
    const int kernel = task[Field(kKernelD + axis)], stride = task[Field(kStrideD + axis)];
    tile.first[axis] = number[axis] * size;
    tile.size[axis] = smaller(size, out - tile.first[axis]);
    tile.phases[axis] = smaller(kernel, stride);
    reach[axis] = (tile.size[axis] - 1) * stride + kernel;
    extent[axis] = ceil_div(reach[axis], stride);
  }
  const int nh = tile.size[1], nw = tile.size[2];
  // the next length that is at least what is needed and congruent to the outputs, modulo P_F
  tile.pitch = extent[2] + (nw - extent[2] % kPf + kPf * kTw * kPf) % kPf;
  tile.plane = extent[1] * tile.pitch;
  tile.plane += (nh * nw - tile.plane % kPf + kPf * kTh * kTw * kPf) % kPf;
  tile.block = extent[0] * tile.plane;
  tile.feature_rows = ceil_div(tile.size[0] * nh * nw, kPf);
  tile.step[2] = kPf % nw;
  tile.step[1] = kPf / nw % nh;
  tile.step[0] = kPf / nw / nh;
  tile.row_wrap_w = (tile.pitch - nw) / kPf;
  tile.row_wrap_h = (tile.plane - nh * tile.pitch) / kPf;
  tile.row_step = 1 + kPf / nw * tile.row_wrap_w + tile.step[0] * tile.row_wrap_h;
lanes:
  for (int i = 0; i < kPf; ++i) {
    const int at[3] = {i / nw / nh, i / nw % nh, i % nw};
    for (int axis = 0; axis < 3; ++axis) tile.lane_at[i][axis] = at[axis];
    tile.lane_row[i] = (at[0] * tile.plane + at[1] * tile.pitch + at[2] - i) / kPf;
  }
  return tile;
}

// Every process that follows the plan gets its own copy of the tiles and of the items.
void read_plan(const Task& task, const Word* words, Stream<Tile>& tiles_to_read,
               Stream<Tile>& tiles_to_place, Stream<Tile>& tiles_to_word,
               Stream<Tile>& tiles_to_multiply, Stream<Tile>& tiles_to_scale,
               Stream<Tile>& tiles_to_add, Stream<Tile>& tiles_to_store,
               Stream<Item>& items_to_read,
               Stream<Item>& items_to_place, Stream<Item>& items_to_word,
               Stream<Item>& items_to_multiply, long& trips) {
tiles_d:
  for (int d = 0; d < tiles_along(task, 0); ++d)
  tiles_h:
    for (int h = 0; h < tiles_along(task, 1); ++h)
    tiles_w:
      for (int w = 0; w < tiles_along(task, 2); ++w) {
        const Tile tile = make_tile(task, d, h, w);
        tiles_to_read.write(tile);
        tiles_to_place.write(tile);
        tiles_to_word.write(tile);
        tiles_to_multiply.write(tile);
        tiles_to_scale.write(tile);
        tiles_to_add.write(tile);
        tiles_to_store.write(tile);
      items:
        for (int i = 0; i < task[kItemCount]; ++i) {
          // II = 1: nothing is carried from one item to the next
#pragma HLS PIPELINE II = 1
          KGRC_TRIP();
          const Word word = words[task[kItems] + i];
          Item item;
          item.channel_tile = int(word & 0xffff);
          item.slot = int(word >> 16 & 0xff);
          item.mask = int(word >> 24 & 0xffff);
          item.new_region = bool(word >> 40 & 1);
          item.end_block = bool(word >> 41 & 1);
          item.blocks = int(word >> 48 & 0xffff);
          item.first = i == 0;
          items_to_read.write(item);
          items_to_place.write(item);
          items_to_word.write(item);
          items_to_multiply.write(item);
          ++trips;
        }
      }
}

}  // namespace kgrc
