// Plain data shared by every back end. No functions here, so that one definition serves objects built for different CPUs.
#pragma once
#include <cstdint>

constexpr int kTile = 16;            // pixels along a tile's edge
constexpr int kBlock = 4;            // pixels along the edge of a block, the unit of coverage inside a tile
constexpr int kTilePixels = kTile * kTile;
constexpr int kBlockPixels = kBlock * kBlock;
constexpr int kGeometrySums = 16;    // per-surfel sums of backward before the features, see pixel.h

enum AuxMap : int { kDepth = 1, kNormal = 2, kMedianDepth = 4, kDistortion = 8 };
enum Cutoff : int { kExact = 0, kSquare3Sigma = 1 };

template <class T> struct Camera {
  T rotation[9], translation[3];     // world to camera, row-major
  T fx, fy, cx, cy;
  T eye[3], eye_low[3], volume;      // the camera's place, in two parts for twice the precision; determinant of the rotation (1)
};

template <class T> struct SurfelInput { const T *mean, *quat, *scale; T opacity; };
template <class T> struct SurfelGradient { T mean[3], quat[4], scale[2], opacity, screen[2]; };

// Everything a pixel needs to know about one surfel seen by one camera: 16 numbers.
// (x', y') = pixel - centre;  w = 1 + g0 x' + g1 y';  u = (m00 x' + m01 y')/w;  v = (m10 x' + m11 y')/w;  depth = z/w.
template <class T> struct Record {
  T centre_x, centre_y;              // projected mean, pixels
  T m00, m01, m10, m11, g0, g1, z;
  T lowpass_x, lowpass_y;            // centre of the 3-sigma box minus the projected mean, pixels
  T log2_opacity;
  T normal[3];                       // camera space, facing the camera
  T level;                           // u^2 + v^2 at which opacity has fallen to 1/255: 2 ln(255 opacity)
};

struct Box { int x0, x1, y0, y1; };  // pixels, both ends inclusive; empty when x0 > x1

// One surfel in one tile. key sorts front to back: the bits of the (positive) float depth, then the surfel's index.
struct Pair {
  uint64_t key;
  uint32_t slot;                     // row of this pair in the gradient buffer; the pairs of a surfel are neighbours
  uint32_t blocks;                   // bit i: the surfel touches block i of the tile (row-major, 4x4 blocks)
};
